"""Which pages of the cache belong to which sequence: the books of a page pool, kept on the host.

    manager = BlockManager(num_blocks=1000, page_block_size=64)
    reused = manager.allocate("a", prompt)  # pages for it; `reused` tokens are in the cache already
    ...  # the device writes the others into manager.pages("a")
    manager.publish("a", prompt, len(prompt))  # its full pages may be shared from now on
    manager.grow("a", len(prompt) + 1)  # a page more, where the next token begins one
    manager.free("a")

Sequences that begin alike share pages. A page is known by a hash over all tokens from the start of
the sequence to the end of the page, because its cache entries depend on all of them. Only pages
that are full and written are shared, and those are never written again, so nothing is ever copied.
A page that nobody holds any more stays findable until it is handed out again, the least recently
used first: a sequence that lost its pages to others and comes back may find some of them untouched.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Hashable, Sequence

import numpy as np


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than a call needs. The call has changed nothing."""


@dataclasses.dataclass
class _Held:
    """What one sequence holds."""

    pages: list[int]
    digests: list[bytes]  # of its first pages, as far as they are published


class BlockManager:
    """Hands out the pages 0 .. num_blocks - 1, each of page_block_size tokens.

    Args:
      num_blocks: pages of the pool; of one layer, where one buffer holds the pages of all layers.
      page_block_size: tokens a page.
    """

    def __init__(self, num_blocks: int, page_block_size: int):
        for name, value in (("num_blocks", num_blocks), ("page_block_size", page_block_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_blocks = num_blocks
        self.page_block_size = page_block_size
        self._held: dict[Hashable, _Held] = {}
        self._references = [0] * num_blocks  # how many sequences hold a page
        # In the order in which they are handed out: pages without content, then the others from the
        # least recently used one on.
        self._free = collections.OrderedDict.fromkeys(range(num_blocks))
        self._page_of: dict[bytes, int] = {}  # published content -> page, and back
        self._digest_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def pages(self, sequence: Hashable) -> list[int]:
        """The pages of a sequence, in order: its row of the block table."""
        return list(self._find(sequence).pages)

    def pages_for(self, length: int) -> int:
        """How many pages `length` tokens take."""
        return -(-length // self.page_block_size)

    def allocate(self, sequence: Hashable, tokens: Sequence[int], reserve: int = 0) -> int:
        """Gives a new sequence the pages for its tokens.

        Args:
          sequence: the name of the sequence; it must hold no pages.
          tokens: all of its tokens so far, at least one.
          reserve: pages that must stay free.

        Returns:
          How many of the first tokens are in the cache already, in pages shared with others. At
          least one token is left to be computed, for its logits.

        Raises:
          OutOfPages: fewer pages than needed are free.
          ValueError: the sequence holds pages, or has no token.
        """
        if sequence in self._held:
            raise ValueError(f"sequence {sequence!r} holds pages already: grow it, or free it")
        if not len(tokens):
            raise ValueError(f"tokens of sequence {sequence!r} must not be empty")
        digests = self._published_prefix(tokens)
        shared = [self._page_of[digest] for digest in digests]
        fresh = self.pages_for(len(tokens)) - len(shared)
        revived = sum(self._references[page] == 0 for page in shared)
        self._require(fresh + revived, reserve)
        for page in shared:  # first, so that none of them is handed out below
            self._references[page] += 1
            self._free.pop(page, None)
        self._held[sequence] = _Held(shared + [self._hand_out() for _ in range(fresh)], digests)
        return len(shared) * self.page_block_size

    def grow(self, sequence: Hashable, length: int) -> list[int]:
        """Gives a sequence the pages it lacks for `length` tokens; returns these pages.

        Raises:
          OutOfPages: fewer pages than needed are free.
          ValueError: the sequence holds no pages.
        """
        held = self._find(sequence)
        missing = max(self.pages_for(length) - len(held.pages), 0)
        self._require(missing)
        new = [self._hand_out() for _ in range(missing)]
        held.pages += new
        return new

    def publish(self, sequence: Hashable, tokens: Sequence[int], length: int) -> None:
        """Lets others share the full pages among the first `length` tokens.

        Call it when these are written, or when the program that writes them stands in the device's
        queue before any that reads them. They must not be written again.

        Args:
          sequence: its name.
          tokens: its tokens from the first on, at least `length`. Those of pages that were
            published before are not looked at.
          length: how many are written.

        Raises:
          ValueError: the sequence holds no pages, or not as many as that, or there are not as many
            tokens.
        """
        held, page = self._find(sequence), self.page_block_size
        if length > min(len(tokens), len(held.pages) * page):
            raise ValueError(
                f"length must be at most the {len(tokens)} tokens given and the "
                f"{len(held.pages) * page} that the pages of sequence {sequence!r} hold, "
                f"got {length}"
            )
        for index in range(len(held.digests), length // page):
            digest = self._digest(held.digests, tokens, index)
            held.digests.append(digest)
            # Where two sequences computed the same page, the first one's is the one that is found.
            if digest not in self._page_of:
                self._page_of[digest] = held.pages[index]
                self._digest_of[held.pages[index]] = digest

    def free(self, sequence: Hashable) -> None:
        """Takes a sequence's pages back; those that others share stay theirs.

        Raises:
          ValueError: the sequence holds no pages.
        """
        held = self._find(sequence)
        del self._held[sequence]
        for page in reversed(held.pages):  # the first page is the likeliest to be shared: last
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._digest_of)

    def check(self) -> None:
        """Checks the books.

        Raises:
          RuntimeError: they do not balance; it says where.
        """
        counted = collections.Counter(page for held in self._held.values() for page in held.pages)
        for page, references in enumerate(self._references):
            if references != counted[page]:
                raise RuntimeError(f"page {page}: {references} references, {counted[page]} holders")
            if (page in self._free) != (references == 0):
                raise RuntimeError(f"page {page}: free and held, or neither")
            if references > 1 and page not in self._digest_of:
                raise RuntimeError(f"page {page}: shared without being published")
        if len(self._free) + len(counted) != self.num_blocks:
            raise RuntimeError(
                f"{len(self._free)} free + {len(counted)} held: not {self.num_blocks}"
            )
        if self._digest_of != {page: digest for digest, page in self._page_of.items()}:
            raise RuntimeError("published pages and their contents do not match")
        for name, held in self._held.items():
            if len(set(held.pages)) < len(held.pages):
                raise RuntimeError(f"sequence {name!r} holds a page twice: {held.pages}")

    def _find(self, sequence: Hashable) -> _Held:
        if sequence not in self._held:
            raise ValueError(f"sequence {sequence!r} holds no pages: allocate it first")
        return self._held[sequence]

    def _require(self, pages: int, reserve: int = 0) -> None:
        if pages and pages + reserve > self.num_free:
            kept = f", with {reserve} to stay free" if reserve else ""
            raise OutOfPages(f"{pages} pages are needed{kept}, {self.num_free} are free")

    def _hand_out(self) -> int:
        page, _ = self._free.popitem(last=False)
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
        self._references[page] = 1
        return page

    def _published_prefix(self, tokens: Sequence[int]) -> list[bytes]:
        """The digests of published pages that tokens begin with, without the last token."""
        digests: list[bytes] = []
        for index in range((len(tokens) - 1) // self.page_block_size):
            digest = self._digest(digests, tokens, index)
            if digest not in self._page_of:
                break
            digests.append(digest)
        return digests

    def _digest(self, before: list[bytes], tokens: Sequence[int], index: int) -> bytes:
        """Of page `index`: a hash over the digest of the page before it and its own tokens."""
        page = tokens[index * self.page_block_size : (index + 1) * self.page_block_size]
        parent = before[index - 1] if index else b""
        return hashlib.sha256(parent + np.asarray(page, np.int64).tobytes()).digest()

"""Every public name has a docstring, and the examples in it give what they say."""

import doctest
import inspect
import re

import pytest

import jax_flashmla as fm
from jax_flashmla import _ffi

PUBLIC = [name for name in fm.__all__ if name != "__version__"]
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(fm, name))]


def docstring(name):
    """Of a constant it is the string after its assignment, which Python does not keep."""
    if name == "EXPORT_DISABLED_CHECKS":
        source = inspect.getsource(_ffi)
        (found,) = re.findall(rf'^{name} = [^\n]*\n"""(.*?)"""', source, re.MULTILINE | re.DOTALL)
        return found
    return inspect.getdoc(getattr(fm, name))


def sections(name):
    """The sections of a docstring by title: Args, Returns, Raises, Example."""
    titles = re.split(r"^(\w+):\n", docstring(name), flags=re.MULTILINE)
    return dict(zip(titles[1::2], titles[2::2], strict=True))


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name):
    example = sections(name)["Example"]
    test = doctest.DocTestParser().get_doctest(inspect.cleandoc(example), {}, name, None, 0)
    assert test.examples, "the section holds no code"
    assert any(e.want for e in test.examples), "the example shows no result"
    lines = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=lines.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(lines)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections(name):
    found = sections(name)
    assert list(found) == ["Args", "Returns", "Raises", "Example"]
    entries = re.findall(r"^  ([a-z_]+(?:, [a-z_]+)*):", found["Args"], re.MULTILINE)
    described = ", ".join(entries).split(", ")
    assert described == list(inspect.signature(getattr(fm, name)).parameters)
    assert "TypeError" in found["Raises"]
    assert "ValueError" in found["Raises"]


def test_public_names():
    assert set(fm.__all__) == {name for name in dir(fm) if name in fm.__all__}
    assert sorted(fm.__all__) == fm.__all__

"""A PyTorch for peers on the CPU: arrays of NumPy, and graphs that run their calls again."""

import contextlib
import functools
import types

import numpy as np


class Tensor(np.ndarray):
    def fill_(self, value):
        self[...] = value

    def contiguous(self):
        return self

    def clone(self, memory_format):
        return self.copy()


def as_tensor(result):
    return np.array(result).view(Tensor) if hasattr(result, "shape") else result


class Graph:
    def __init__(self):
        self.calls = []  # (function, arguments, results)

    def replay(self):
        for function, args, results in self.calls:
            for old, new in zip(results, function(*args), strict=True):
                if isinstance(old, Tensor):
                    old[...] = new


class FakeTorch:
    """Its operators are {library: {name: function of arrays}}; streams do nothing."""

    contiguous_format = "contiguous"

    def __init__(self, libraries):
        self.cuda, self.graphs, self._open = self, [], None
        spaces = {
            library: types.SimpleNamespace(
                **{name: functools.partial(self._call, f) for name, f in functions.items()}
            )
            for library, functions in libraries.items()
        }
        self.ops = types.SimpleNamespace(load_library=lambda path: None, **spaces)

    def _call(self, function, *args):
        results = function(*args)
        several = isinstance(results, tuple | list)
        results = [as_tensor(x) for x in (results if several else [results])]
        if self._open is not None:
            self._open.calls.append((function, args, results))
        return results if several else results[0]

    def from_dlpack(self, array):
        return np.asarray(array).view(Tensor)

    def CUDAGraph(self):
        self.graphs.append(Graph())
        return self.graphs[-1]

    def Stream(self):
        return "side"

    def synchronize(self):
        pass

    @contextlib.contextmanager
    def stream(self, stream):
        yield

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"  # JAX may compile meanwhile
        self._open = graph
        yield
        self._open = None

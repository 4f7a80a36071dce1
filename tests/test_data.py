"""Managed arrays and their regions: what they are made of, what they show, what they refuse.

That indexing means what it means to NumPy is asked of NumPy itself: whatever index is applied to an
array and to its managed twin, a body sees the same elements.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from support import anything

import charioteer as ch

Array = np.ndarray[Any, np.dtype[Any]]


@ch.task
def look(a: ch.In[Array]) -> tuple[Array, bool]:
    return a.copy(), a.flags.writeable


@ch.task
def add_one(a: ch.InOut[Array]) -> None:
    a += 1


BASIC = npst.arrays(
    st.sampled_from([np.float64, np.int32, np.bool_, np.complex64, "U3", "M8[s]"]),
    npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    fill=st.nothing(),
    elements=None,
)


def seen_by_numpy(x: Array, index: Any) -> Array:
    """What an index selects, as an array also where that is one element."""
    all_of_it = index if isinstance(index, tuple) else (index,)
    return np.asarray(x[all_of_it if ... in all_of_it else (*all_of_it, ...)])


@given(x=BASIC, data=st.data())
@settings(max_examples=60)
def test_a_region_shows_what_numpy_shows(x: Array, data: st.DataObject) -> None:
    indices = npst.basic_indices(x.shape, allow_newaxis=True, allow_ellipsis=True)
    first = data.draw(indices, label="index")
    expected = seen_by_numpy(x, first)
    with ch.Runtime(workers=0):
        A = ch.array(x)
        region = A[first]
        assert region.shape == expected.shape
        assert region.size == expected.size and region.ndim == expected.ndim
        assert region.dtype == x.dtype and region.nbytes == expected.nbytes
        assert region.base is A
        seen, writable = look(region).result()
        np.testing.assert_array_equal(seen, expected)
        assert seen.shape == expected.shape and not writable
        # And once more, of what is seen. An added axis cannot be emptied, which NumPy can.
        second = data.draw(npst.basic_indices(expected.shape, allow_newaxis=True), label="again")
        twice = seen_by_numpy(expected, second)
        try:
            nested = region[second]
        except ch.AccessError:
            assert not twice.size
            return
        assert nested.shape == twice.shape and nested.base is A
        np.testing.assert_array_equal(look(nested).result()[0], twice)


def test_arrays_are_made_like_numpys(rt_any: ch.Runtime) -> None:
    x = np.arange(12, dtype=np.int16).reshape(3, 4)
    made = {
        "array": (ch.array(x), x),
        "of a list": (ch.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])),
        "of another dtype": (ch.array(x, np.float32), x.astype(np.float32)),
        "of any strides": (ch.array(x.T[::-1, ::2]), x.T[::-1, ::2]),
        "of a managed array": (ch.array(ch.asarray(x.copy())[1:]), x[1:]),
        "zeros": (ch.zeros((2, 3), int), np.zeros((2, 3), int)),
        "of one extent": (ch.zeros(4), np.zeros(4)),
        "full": (ch.full((2, 2), 7), np.full((2, 2), 7)),
        "full of rows": (ch.full((2, 2), [1.5, 2.5]), np.full((2, 2), [1.5, 2.5])),
        "no dimensions": (ch.array(3.5), np.array(3.5)),
        "no elements": (ch.zeros((0, 3)), np.zeros((0, 3))),
    }
    for what, (A, expected) in made.items():
        assert isinstance(A, ch.Array) and isinstance(A, ch.Region), what
        got = A.numpy()
        np.testing.assert_array_equal(got, expected, err_msg=what)
        assert got.dtype == expected.dtype and got.flags.c_contiguous, what
    assert ch.empty((2, 3), np.uint8).shape == (2, 3)
    # A copy is nobody's but its owner's.
    A = ch.array(x)
    x[0, 0] = 99
    assert A.numpy()[0, 0] == 0
    A.numpy()[...] = 5
    assert A.numpy()[0, 0] == 0


def test_asarray_takes_the_buffer_over(rt_any: ch.Runtime) -> None:
    x = np.zeros((3, 3))
    A = ch.asarray(x)
    assert ch.asarray(A) is A
    add_one(A[1]).result()
    A.release()
    np.testing.assert_array_equal(x[1], 1)
    # What is not in C order, of another dtype, or not writable is copied.
    for other in (np.zeros((3, 3)).T[::2], np.zeros(3, np.float32), np.broadcast_to(0.0, (3,))):
        B = ch.asarray(other, np.float64)
        add_one(B).result()
        assert not other.any()
        assert B.numpy().all()


def test_a_buffer_is_let_go_with_its_handles() -> None:
    x = np.zeros(4)
    gone = weakref.ref(x)
    A = ch.asarray(x)
    with ch.Runtime(workers=1):
        add_one(A[:2]).result()
    region = A[2:]
    del x, A
    gc.collect()
    assert gone() is not None
    del region
    gc.collect()
    assert gone() is None


def test_tiles(rt_any: ch.Runtime) -> None:
    x = np.arange(35.0).reshape(5, 7)
    A = ch.array(x)
    T = A.tiles((2, 3))
    assert T.base is A and T.shape == (3, 3) and T.tile == (2, 3) and len(T) == 9
    for i in range(3):
        for j in range(3):
            expected = x[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            assert T[i, j] is T[i, j] and T[i, j] is T[i - 3, j - 3]
            assert T[i, j].shape == expected.shape
            np.testing.assert_array_equal(look(T[i, j]).result()[0], expected)
    assert T[np.int64(1), 2] is T[1, 2]
    assert T[0, :] == [T[0, 0], T[0, 1], T[0, 2]]
    assert T[::-2, 1] == [T[2, 1], T[0, 1]]
    assert T[1, 2:2] == []
    assert [tile.shape for tile in T][:3] == [(2, 3), (2, 3), (2, 1)]
    line = ch.array(np.arange(5)).tiles(2)
    assert line.shape == (3,) and line[2].shape == (1,)
    np.testing.assert_array_equal(line[-1].numpy(), [4])
    # Of a region too.
    inner = A[1:, ::2].tiles((3, 3))
    np.testing.assert_array_equal(inner[0, 1].numpy(), x[1:, ::2][:3, 3:])
    assert len(ch.zeros((0, 3)).tiles((2, 2))) == 0
    assert ch.array(1.0).tiles(())[()].shape == ()


def test_shards(rt_any: ch.Runtime) -> None:
    x = np.arange(22.0).reshape(2, 11)
    A = ch.array(x)
    for n in (1, 3, 11):
        shards = A.shards(n, axis=1)
        for shard, expected in zip(shards, np.array_split(x, n, axis=1), strict=True):
            np.testing.assert_array_equal(shard.numpy(), expected)
    assert [s.shape for s in A.shards(2)] == [(1, 11), (1, 11)]
    assert [s.shape for s in A.shards(2, axis=-1)] == [(2, 6), (2, 5)]
    for n, axis in ((0, 0), (-1, 0), (3, 0), (12, 1), (2, 2), (2, -3)):
        with pytest.raises(ValueError, match="cannot be sharded"):
            A.shards(n, axis=axis)
    with pytest.raises(ValueError, match="cannot be sharded"):
        ch.array(1.0).shards(1)


def test_repr_and_iteration() -> None:
    A = ch.zeros((2, 3), name="A")
    assert repr(A) == "<Array A (2, 3) float64>"
    assert repr(A[0]) == "<Region A[0:1, 0:3] (3,) float64>"
    assert repr(A.tiles((2, 2))) == "<Tiles of A: (1, 2) of (2, 2)>"
    assert repr(ch.token("t")) == "<Token t>"
    assert repr(ch.unordered(A)) == "unordered(<Array A (2, 3) float64>)"
    assert len(A) == 2 and [row.shape for row in A] == [(3,), (3,)]
    assert "array" in repr(ch.zeros(1))
    assert A[0] == A[0] and A[0] != A[1] and hash(A[0]) == hash(A[0])
    assert A[:] == A and A[0] != ch.zeros((2, 3))[0]


COMPUTES = {
    "+": lambda a: a + 1,
    "1 +": lambda a: 1 + a,
    "array -": lambda a: np.ones(3) - a,
    "* itself": lambda a: a * a,
    "@": lambda a: a @ a,
    "-": lambda a: -a,
    "abs": abs,
    "<": lambda a: a < 1,
    "== 1": lambda a: a == 1,
    "== array": lambda a: a == np.ones(3),
    "np.add": lambda a: np.add(a, 1),
    "np.exp": lambda a: np.exp(a),
    "if": lambda a: 1 if a else 2,
    "float": float,
    "int": int,
    "**": lambda a: a**2,
    "divmod": lambda a: divmod(a, 2),
}


@pytest.mark.parametrize("what", COMPUTES)
def test_computing_with_a_handle_is_refused(what: str) -> None:
    A = ch.zeros((3, 3))
    for handle in (A, A[0], A.tiles((2, 2))[0, 0]):
        with pytest.raises(TypeError, match=r"handle|__array_ufunc__"):
            COMPUTES[what](handle)
    with pytest.raises(TypeError, match="handle"):
        A[0] += 1


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "objects": (lambda: ch.array([object()]), ch.AccessError),
    "objects by dtype": (lambda: ch.zeros(3, object), ch.AccessError),
    "a record with objects": (lambda: ch.empty(1, [("a", object)]), ch.AccessError),
    "a ragged list": (lambda: ch.array([[1], [1, 2]]), ValueError),
    "a negative extent": (lambda: ch.zeros(-1), ValueError),
    "no shape": (lambda: ch.zeros(anything("3")), TypeError),
    "a name that is none": (lambda: ch.zeros(3, name=anything(3)), TypeError),
    "beyond the end": (lambda: ch.zeros(3)[3], IndexError),
    "a huge index": (lambda: ch.zeros(3)[1 << 80], IndexError),
    "too many indices": (lambda: ch.zeros(3)[0, 0], IndexError),
    "two ellipses": (lambda: ch.zeros((3, 3))[..., ...], IndexError),
    "a step of nothing": (lambda: ch.zeros(3)[::0], ValueError),
    "a list": (lambda: ch.zeros(3)[anything([0, 1])], ch.AccessError),
    "a mask": (lambda: ch.zeros(3)[anything(np.ones(3, bool))], ch.AccessError),
    "a bool": (lambda: ch.zeros(3)[True], ch.AccessError),
    "a float": (lambda: ch.zeros(3)[anything(1.0)], ch.AccessError),
    "the length of nothing": (lambda: len(ch.array(1.0)), TypeError),
    "tiles of other dimensions": (lambda: ch.zeros((3, 3)).tiles(2), ValueError),
    "an empty tile": (lambda: ch.zeros(3).tiles(0), ValueError),
    "a tile of floats": (lambda: ch.zeros(3).tiles(anything((1.5,))), TypeError),
    "a tile beyond": (lambda: ch.zeros(3).tiles(2)[2], IndexError),
    "a tile of a plane": (lambda: ch.zeros((3, 3)).tiles((2, 2))[0], IndexError),
    "a tile by name": (lambda: ch.zeros(3).tiles(2)[anything("0")], TypeError),
    "unordered nothing": (lambda: ch.unordered(np.zeros(3)), ch.AccessError),
    "a mode of the host": (lambda: ch.zeros(3).host(anything("w")), ValueError),
    "an array that is no copy": (lambda: np.array(ch.zeros(3), copy=False), ValueError),
}
if np.lib.NumpyVersion(np.__version__) < "2.0.0":
    del BAD["an array that is no copy"]


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, errors = BAD[case]
    with pytest.raises(errors) as caught:
        call()
    assert str(caught.value)


def test_the_buffer_of_an_array_is_checked() -> None:
    for wrong in (np.zeros((3, 3)).T, np.broadcast_to(0.0, 3), np.array([object()])):
        with pytest.raises(ValueError, match="buffer"):
            ch.Array(wrong, "A")
    with pytest.raises(TypeError, match="buffer"):
        ch.Array(anything([1, 2]), "A")

"""Reading weight files: all formats, folders, and files that are damaged, of another kind, or malicious."""

from __future__ import annotations

import collections
import inspect
import io
import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from m2f.model.errors import WeightsError
from m2f.model.weights import pickles
from m2f.model.weights.files import FROZEN_KEY, read_state

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.5, -2.0]).half()}


def assert_is_the_state(read):
    assert set(read) == set(STATE)
    assert all(torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in STATE.items())


def arrays():
    return {key: tensor.numpy() for key, tensor in STATE.items()}


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_old_and_new_are_read(tmp_path, wrapper, zipped):
    content = STATE if wrapper is None else {wrapper: STATE, "iteration": 7, "note": "text"}
    torch.save(content, tmp_path / "any.name", _use_new_zipfile_serialization=zipped)
    assert_is_the_state(read_state(tmp_path / "any.name"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detectron_pickles_of_arrays_are_read(tmp_path, protocol):
    content = {"model": arrays(), "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    assert_is_the_state(read_state(tmp_path / "model.pkl"))


def test_pickles_that_older_numpy_wrote_are_read(tmp_path):
    data = pickle.dumps({"model": arrays()}, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    (tmp_path / "model.pkl").write_bytes(data)
    assert_is_the_state(read_state(tmp_path / "model.pkl"))


def test_pickles_of_torch_tensors_are_read(tmp_path):
    content = {"model": collections.OrderedDict(STATE), "__author__": "third_party", "matching_heuristics": True}
    (tmp_path / "swin.pkl").write_bytes(pickle.dumps(content))
    assert_is_the_state(read_state(tmp_path / "swin.pkl"))


def test_values_other_than_numeric_arrays_are_skipped(tmp_path):
    content = {**arrays(), "step": np.int64(3), "names": np.array(["a"]), "objects": np.array([None, 1])}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    assert_is_the_state(read_state(tmp_path / "model.pkl"))


@pytest.mark.parametrize("name", ["weights.safetensors", "model.safetensors", "pytorch_model.bin"])
def test_folders_of_checkpoints_are_read(tmp_path, name):
    if name.endswith(".bin"):
        torch.save(STATE, tmp_path / name)
    else:
        safetensors.torch.save_file(STATE, tmp_path / name)
    assert_is_the_state(read_state(tmp_path))


def write_sharded(folder, first="model-1.safetensors"):
    safetensors.torch.save_file({"a.weight": STATE["a.weight"]}, folder / "model-1.safetensors")
    safetensors.torch.save_file({"a.bias": STATE["a.bias"]}, folder / "model-2.safetensors")
    index = {"weight_map": {"a.weight": first, "a.bias": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_folders_with_several_weight_files_are_read(tmp_path):
    write_sharded(tmp_path)
    assert_is_the_state(read_state(tmp_path))


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/etc/passwd"])
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, shard):
    write_sharded(tmp_path, first=shard)
    with pytest.raises(WeightsError, match=r"which is not in the same folder"):
        read_state(tmp_path)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def test_no_pickle_is_executed(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "new.pth")
    torch.save({"model": Evil()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(1), "b": Evil()}}))
    for name in ("new.pth", "old.pth", "plain.pkl"):
        with pytest.raises(
            WeightsError, match=rf"(?i){name} cannot be read: it references .*fail, .*nothing in it was exec"
        ):
            read_state(tmp_path / name)


@pytest.mark.parametrize("call", ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "numpy.load"])
def test_pickle_may_reference_only_array_constructors(tmp_path, call):
    module, _, name = call.rpartition(".")
    code = f"c{module}\n{name}\n(Vecho\ntR.".encode()
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x02" + code)
    with pytest.raises(WeightsError, match=f"it references {call}"):
        read_state(tmp_path / "evil.pkl")


def test_a_pickle_inside_a_storage_is_not_executed(tmp_path):
    inner = pickle.dumps(Evil())
    code = b"\x80\x04ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R."
    (tmp_path / "evil.pkl").write_bytes(code)
    with pytest.raises(WeightsError, match=r"evil\.pkl cannot be read"):
        read_state(tmp_path / "evil.pkl")


@pytest.mark.parametrize("kind", ["new.pth", "old.pth", "model.pkl", "model.safetensors"])
@pytest.mark.parametrize("share", [0.1, 0.6, 0.97])
def test_truncated_files_are_reported(tmp_path, kind, share):
    path, big = tmp_path / kind, {"w": torch.rand(1000)}
    match kind:
        case "model.safetensors":
            safetensors.torch.save_file(big, path)
        case "model.pkl":
            path.write_bytes(pickle.dumps({"w": big["w"].numpy()}))
        case _:
            torch.save(big, path, _use_new_zipfile_serialization=kind == "new.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=rf"{kind} cannot be read: it may be truncated, it has \d+ bytes \([^.]*\)$"):
        read_state(path)


def test_files_without_weights_are_refused(tmp_path):
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.pth", r"\(0 bytes\) are neither a safetensors file nor a torch file nor a pickle"),
        ("page.pth", r"\(16 bytes\) are neither"),
        ("pointer.safetensors", "a Git LFS pointer"),
        ("list.pkl", "contain a list without named tensors"),
        ("folder", r"the folder contains none of weights\.safetensors, model\.safetensors"),
        ("absent", "no such file or folder"),
    ):
        with pytest.raises(WeightsError, match=message):
            read_state(tmp_path / name)


NAMES = {
    "OrderedDict": b"ccollections\nOrderedDict\n",
    "encode": b"c_codecs\nencode\n",
    "bytes": b"c__builtin__\nbytes\n",
    "ndarray": b"cnumpy\nndarray\n",
    "dtype": b"cnumpy\ndtype\n",
    "reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n",
    "scalar": b"cnumpy._core.multiarray\nscalar\n",
    "frombuffer": b"cnumpy._core.numeric\n_frombuffer\n",
    "rebuild": b"ctorch._utils\n_rebuild_tensor_v2\n",
    "load": b"ctorch.storage\n_load_from_bytes\n",
}
"""Every name that a pickle may reference, as the opcode that looks it up."""

CHANGES = {
    "BUILD": b"(dU\x01xK\x01sb",  # sets attribute x through the instance dictionary
    "BUILD slots": b"N(dU\x0c__defaults__(K\x01ts\x86b",  # sets the defaults of a function with setattr
    "BUILD state": b"(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",  # a valid state of a dtype: big-endian
    "SETITEM": b"U\x01xK\x01s",
    "SETITEMS": b"(U\x01xK\x01u",
    "APPEND": b"K\x01a",
    "APPENDS": b"(K\x01e",
    "ADDITEMS": b"(K\x01\x90",
}


def global_in_torch_file(module, name):
    """Return a torch file of the old format whose content is a reference to a class or function."""
    plain = io.BytesIO()
    torch.save({}, plain, _use_new_zipfile_serialization=False)
    return plain.getvalue().replace(pickle.dumps({}, protocol=2), f"\x80\x02c{module}\n{name}\n.".encode("latin1"), 1)


def as_bytes_argument(data):
    return b"B" + len(data).to_bytes(4, "little") + data + b"\x85R"


CONSTRUCTED = {
    "shared data type": NAMES["dtype"] + b"U\x02f8\x85R",
    "own data type": NAMES["dtype"] + b"U\x02f8\x89\x88\x87R",
    "data type of dates": NAMES["dtype"] + b"U\x05M8[s]\x85R",
    "array": NAMES["reconstruct"] + NAMES["ndarray"] + b"K\x00\x85U\x01b\x87R",
    "storage": NAMES["load"] + as_bytes_argument(torch.zeros(2)._typed_storage().__reduce__()[1][0]),
    "function of torch": NAMES["load"] + as_bytes_argument(global_in_torch_file("torch._utils", "_rebuild_parameter")),
    "class of torch": NAMES["load"] + as_bytes_argument(global_in_torch_file("torch", "FloatStorage")),
}
"""Objects that calls of these names construct, as opcodes."""


def reachable():
    """Return the state of all that a pickle could change: functions, classes and data types of the process."""
    functions = [value for value in vars(pickles).values() if inspect.isfunction(value)]
    functions += [torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor, torch._utils._rebuild_parameter]
    functions += [torch.storage._load_from_bytes, np._core.numeric._frombuffer]
    classes = [value for value in vars(pickles).values() if inspect.isclass(value)]
    classes += [collections.OrderedDict, np.ndarray, np.dtype, torch.Tensor]
    classes += [torch.FloatStorage, torch.TypedStorage, torch.UntypedStorage]
    types = [np.dtype(code) for code in ("f2", "f4", "f8", "i8", "u1", "b1", "O")]
    return (
        [(f.__defaults__, f.__kwdefaults__, f.__code__, dict(vars(f))) for f in functions],
        [dict(vars(c)) for c in classes],
        [(t.str, t.itemsize, t.fields, t.byteorder) for t in types],
        dict(pickles._ALLOWED),
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("target", [*NAMES.values(), *CONSTRUCTED.values()], ids=[*NAMES, *CONSTRUCTED])
def test_pickle_cannot_modify_the_process(tmp_path, target, change):
    before = reachable()
    (tmp_path / "model.pkl").write_bytes(b"\x80\x02" + target + change + b".")
    with pytest.raises(WeightsError):
        read_state(tmp_path / "model.pkl")
    assert reachable() == before
    assert np.dtype("f8").isnative


@pytest.mark.parametrize(("made", "named"), [("function of torch", "function"), ("class of torch", "StorageType")])
def test_tensor_storage_must_be_a_storage(tmp_path, made, named):
    (tmp_path / "model.pkl").write_bytes(b"\x80\x02" + CONSTRUCTED[made] + b".")
    with pytest.raises(WeightsError, match=f"unexpected {named} as a tensor storage"):
        read_state(tmp_path / "model.pkl")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", ">f8", ">i4", "<i8", "u1", "i1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_of_every_kind_are_read(tmp_path, dtype, order, protocol):
    wanted = np.arange(24).reshape(2, 3, 4).astype(dtype)
    content = {
        "a": np.asarray(wanted, order=order),
        "part": wanted[:, 1::2],
        "one": wanted[1, 2, 3],
        "none": wanted[:0],
    }
    content |= {"scalar array": np.asarray(wanted[1, 0, 3])}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_state(tmp_path / "model.pkl")
    assert set(read) == {"a", "part", "none", "scalar array"}
    for name, tensor in read.items():
        assert tensor.is_contiguous()
        assert tensor.numpy().dtype == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(tensor.numpy(), content[name])


def test_frozen_weights_in_a_second_file_are_read(tmp_path):
    frozen, path = f"frozen-{'0' * 64}.safetensors", tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a.bias": STATE["a.bias"]}, tmp_path / frozen)
    safetensors.torch.save_file({"a.weight": STATE["a.weight"]}, path, {FROZEN_KEY: frozen})
    for source in (path, tmp_path):
        assert_is_the_state(read_state(source))
    (tmp_path / frozen).unlink()
    with pytest.raises(
        WeightsError, match=rf"weights\.safetensors lack the frozen weights, which are in {frozen}; copy"
    ):
        read_state(path)


@pytest.mark.parametrize("name", ["", "..", "../weights.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_frozen_weights_outside_the_folder_are_refused(tmp_path, name):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a.weight": STATE["a.weight"]}, path, {FROZEN_KEY: name})
    with pytest.raises(WeightsError, match="which is not in the same folder"):
        read_state(path)

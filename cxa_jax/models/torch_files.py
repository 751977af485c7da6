"""State dicts that PyTorch or safetensors wrote, as numpy arrays: without torch, and without running what a file says.

A .pt or .pth file is a pickle, which may name any function to be called. Here it is read by an unpickler that knows the
few names of which tensors consist and refuses every other.
"""

import collections
import io
import pathlib
import pickle
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from cxa_jax.errors import UserError

DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")  # where training scripts keep it, beside other things
_MAGIC = 0x1950A86A20F9469CFC6C  # what the format before PyTorch 1.6 starts with
_MAX_DEPTH = 3
_DAMAGE = (EOFError, IndexError, KeyError, OSError, TypeError, AttributeError, OverflowError, ValueError,
           pickle.UnpicklingError, zipfile.BadZipFile, MemoryError)  # fmt: skip


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    num_values: int


class _Tensor(NamedTuple):
    """A tensor as the pickle has it: a view of a storage whose bytes may come later in the file."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Read a .safetensors, .pt or .pth file as {name: array}.

    Raises:
      UserError: no such file, damage, no state dict, or a pickle that asks for more than tensors, such as a whole
        pickled model.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give a state dict (.safetensors, .pt, .pth)")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load_file(path)
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (*_DAMAGE, SafetensorError) as error:
        raise UserError(f"{path} is no readable state dict ({type(error).__name__}: {error})") from error


def _read_zip(path: pathlib.Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError("a zip archive without data.pkl: no file of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise UserError("its bytes are big-endian; save it again on another machine")
        found = _find_tensors(_Unpickler(io.BytesIO(archive.read(pickles[0]))).load())
        blobs = {tensor.storage.key: archive.read(f"{folder}data/{tensor.storage.key}") for tensor in found.values()}
    return {name: _materialize(tensor, blobs[tensor.storage.key]) for name, tensor in found.items()}


def _read_legacy(path: pathlib.Path) -> dict[str, np.ndarray]:
    file = io.BytesIO(path.read_bytes())  # no `peek`: an unpickler then leaves the bytes behind its end alone
    if _Unpickler(file).load() != _MAGIC:
        raise UserError("no file of torch.save")
    _Unpickler(file).load(), _Unpickler(file).load()  # version of the format, sizes of C types
    unpickler = _Unpickler(file)
    found = _find_tensors(unpickler.load())
    blobs = {}
    for key in _Unpickler(file).load():
        storage = unpickler.storages[key]
        num_values = int.from_bytes(file.read(8), "little")
        if num_values != storage.num_values:
            raise UserError(f"storage {key} has {num_values} values, {storage.num_values} were announced")
        blobs[key] = file.read(num_values * storage.dtype.itemsize)
    return {name: _materialize(tensor, blobs[tensor.storage.key]) for name, tensor in found.items()}


class _Unpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers and text, and `_Tensor`s in place of tensors; refuses every other name."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise UserError(
                f"its pickle asks for {module}.{name}, which is not run here: only tensors are read. "
                "Save the weights alone: torch.save(model.state_dict(), FILE), or as .safetensors"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, num_values = pid[:5]
        if kind != "storage" or dtype not in DTYPES or (len(pid) > 5 and pid[5] is not None):
            raise UserError("it holds a kind of tensor that is not read here")
        return self.storages.setdefault(key, _Storage(str(key), np.dtype(DTYPES[dtype]), int(num_values)))


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _find_tensors(content: Any, depth: int = 0) -> dict[str, _Tensor]:
    """Return the state dict of what was unpickled: the thing itself, or what a training script put it under."""
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
        if tensors and all(isinstance(name, str) for name in tensors):
            return tensors
        for key in STATE_DICT_KEYS:
            if depth < _MAX_DEPTH and isinstance(content.get(key), dict):
                return _find_tensors(content[key], depth + 1)
    raise UserError(f"it holds no state dict, neither by itself nor under {', '.join(STATE_DICT_KEYS)}")


def _materialize(tensor: _Tensor, blob: bytes) -> np.ndarray:
    values = np.frombuffer(blob, tensor.storage.dtype.newbyteorder("<"))
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
    is_empty = 0 in tensor.size
    # Checked before the view is made: a wrong stride would read other memory.
    if min((tensor.offset, *tensor.size, *tensor.stride)) < 0 or (not is_empty and last >= len(values)):
        raise UserError("a tensor reaches beyond its storage: the file is damaged")
    if is_empty:
        return np.zeros(tensor.size, tensor.storage.dtype)
    strides = [step * values.itemsize for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(values[tensor.offset :], tensor.size, strides, writeable=False).copy()

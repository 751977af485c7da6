"""DenseNet as PyTorch has it, twice without torch: its files, written by hand, and its network in float64 numpy."""

import io
import pickle
import sys
import types
import zipfile

import numpy as np

EPSILON = 1e-5


def make_state(num_layers, channels=3, seed=0):
    """Return a random state dict by torchvision's names, float32; moments and scales as after training."""
    rng, state = np.random.default_rng(seed), {}

    def conv(name, out, inside, size):
        spread = np.sqrt(2 / (inside * size * size))
        state[f"{name}.weight"] = rng.normal(0, spread, (out, inside, size, size)).astype(np.float32)

    def norm(name, width):
        for role, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3),
                                ("running_var", 1e-4, 1.5)):  # fmt: skip
            state[f"{name}.{role}"] = rng.uniform(low, high, width).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7, np.int64)

    conv("features.conv0", 64, channels, 7)
    norm("features.norm0", 64)
    width = 64
    for i, n in enumerate(num_layers, start=1):
        for j in range(1, n + 1):
            name = f"features.denseblock{i}.denselayer{j}"
            norm(f"{name}.norm1", width)
            conv(f"{name}.conv1", 128, width, 1)
            norm(f"{name}.norm2", 128)
            conv(f"{name}.conv2", 32, 128, 3)
            width += 32
        if i < 4:
            norm(f"features.transition{i}.norm", width)
            conv(f"features.transition{i}.conv", width // 2, width, 1)
            width //= 2
    norm("features.norm5", width)
    state["classifier.weight"] = rng.normal(size=(14, width)).astype(np.float32)
    state["classifier.bias"] = np.zeros(14, np.float32)
    return state


def compute_features(state, num_layers, images):
    """Run torchvision's DenseNet in float64: images [B, C, H, W], standardised -> features [B, C', h, w]."""

    def conv(name, x, stride=1, padding=0):
        kernel = state[f"features.{name}.weight"].astype(np.float64)
        windows = slide(np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding))), kernel.shape[-1], stride)
        return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

    def norm_relu(name, x):
        weight, bias, mean, variance = (
            state[f"features.{name}.{role}"].astype(np.float64)[:, None, None]
            for role in ("weight", "bias", "running_mean", "running_var")
        )
        return np.maximum((x - mean) / np.sqrt(variance + EPSILON) * weight + bias, 0)

    def slide(x, size, stride):
        view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
        return view[:, :, ::stride, ::stride]

    x = norm_relu("norm0", conv("conv0", images, 2, 3))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = slide(padded, 3, 2).max(axis=(-2, -1))
    for i, n in enumerate(num_layers, start=1):
        for j in range(1, n + 1):
            name = f"denseblock{i}.denselayer{j}"
            new = conv(f"{name}.conv1", norm_relu(f"{name}.norm1", x))
            x = np.concatenate([x, conv(f"{name}.conv2", norm_relu(f"{name}.norm2", new), padding=1)], axis=1)
        if i < 4:
            x = slide(conv(f"transition{i}.conv", norm_relu(f"transition{i}.norm", x)), 2, 2).mean(axis=(-2, -1))
    return norm_relu("norm5", x)


STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.float16): "HalfStorage",
}


class TensorPickler(pickle.Pickler):
    """Pickles arrays as torch.save pickles tensors: by torch's names, the bytes apart."""

    def __init__(self, file, monkeypatch, *, legacy):
        super().__init__(file, protocol=2)
        self.blobs, self.legacy = {}, legacy
        utils, torch = types.ModuleType("torch._utils"), types.ModuleType("torch")
        torch._utils = utils
        for module, name in [(utils, "_rebuild_tensor_v2"), *((torch, name) for name in STORAGES.values())]:
            stand_in = types.FunctionType((lambda *_: None).__code__, {}, name)
            stand_in.__module__, stand_in.__qualname__ = module.__name__, name
            setattr(module, name, stand_in)
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setitem(sys.modules, "torch._utils", utils)
        self.torch = torch

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        strides = tuple(step // value.itemsize for step in np.asarray(value, order="C").strides)
        arguments = (Storage(np.asarray(value, order="C")), 0, value.shape, strides, False, {})
        return self.torch._utils._rebuild_tensor_v2, arguments

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        key = str(len(self.blobs))
        self.blobs[key] = value.array
        pid = ("storage", getattr(self.torch, STORAGES[value.array.dtype]), key, "cpu", value.array.size)
        return (*pid, None) if self.legacy else pid


class Storage:
    """Marks the bytes of an array for `TensorPickler.persistent_id`."""

    def __init__(self, array):
        self.array = array


def write_zip(path, content, monkeypatch):
    """Write what torch.save writes since 1.6."""
    file = io.BytesIO()
    pickler = TensorPickler(file, monkeypatch, legacy=False)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, array in pickler.blobs.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def write_legacy(path, content, monkeypatch):
    """Write what torch.save wrote before 1.6: the format of the published torchvision weights."""
    with path.open("wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        pickler = TensorPickler(file, monkeypatch, legacy=True)
        pickler.dump(content)
        pickle.dump(list(pickler.blobs), file, protocol=2)
        for array in pickler.blobs.values():
            file.write(array.size.to_bytes(8, "little") + array.tobytes())

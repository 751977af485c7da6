"""Write the tables of models.md from the code: PYTHONPATH=. python docs/make_models_page.py.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; all else on the page is written by hand. Shapes are
traced without arithmetic, so this takes seconds.
"""

import functools
import importlib
import itertools
import pathlib
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from fields_of_view import find_field

from cxa_jax.model_names import name_run
from cxa_jax.models import BACKBONES, amm, create_model, cxa, densenet, inception_resnet_v2, resnet
from cxa_jax.models.strides import STRIDES

PAGE = pathlib.Path(__file__).with_name("models.md")
TITLES = {
    "dense121": ("CXA_Dense121", "DenseNet121-GAP"),
    "dense201": ("CXA_Dense201", "DenseNet201-GAP"),
    "res50": ("CXA_Res50", "ResNet50-GAP"),
    "incepres2": ("CXA_IncepRes2", "InceptionRes2-GAP"),
}
# Not all of BACKBONES: others may have joined it in this process.
NAMES = ("densenet121", "densenet201", "resnet50", "inception_resnet_v2")
SIZE = 224  # px, of Tables 2 and 3
TABLE_3 = (  # the paper's row, the submodule or the function that is it
    ("batch normalisation", "amm.norm"),
    ("1x1 convolution, ELU", "amm.conv1"),
    ("1x1 convolution, ELU", "amm.conv2"),
    ("1x1 convolution, ELU", "amm.conv3"),
    ("2x2 average pool, stride 1, 'same'", "average_pool_2x2_same"),
    ("1x1 convolution, sigmoid: W", "amm.conv4"),
    ("frozen 1x1 convolution of ones, product, two global averages, their ratio: f", "gwap"),
    ("dropout", "classifier.drop"),
    ("dense, ELU", "classifier.dense1"),
    ("dropout", "classifier.drop"),
    ("dense, sigmoid", "classifier.logit"),
)


class Layer(NamedTuple):
    """One call of a submodule: its path, the module, the output's shape without batch."""

    path: str
    module: nn.Module
    shape: tuple[int, ...]


class Trace(NamedTuple):
    """A network's calls, in order, its variables and its output, as shapes, and all of it as a jaxpr of the images."""

    layers: list[Layer]
    variables: dict[str, Any]
    output: Any
    jaxpr: Any

    def count(self, kind: str, path: str = "") -> int:
        """Count the numbers in 'params' or 'batch_stats' below a dotted path."""
        tree = self.variables.get(kind, {})
        for name in filter(None, path.split(".")):
            tree = tree.get(name, {})
        return sum(leaf.size for leaf in jax.tree.leaves(tree))


class Given(nn.Module):
    """A backbone that returns its input: features stand in for images, the rest is traced alone."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        return images


def trace(module: nn.Module, *shape: int) -> Trace:
    """Trace a module on one image or feature map [H, W, C]; `intercept_methods` sees every call, in order."""
    calls = []

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name == "__call__" and hasattr(out, "shape"):
            calls.append(Layer(".".join(context.module.path), context.module, out.shape[1:]))
        return out

    with nn.intercept_methods(record):
        closed, (output, variables) = jax.make_jaxpr(
            lambda x: module.init_with_output(jax.random.key(0), x, train=False), return_shape=True
        )(jax.ShapeDtypeStruct((1, *shape), jnp.float32))
    return Trace(calls, variables, output, closed.jaxpr)


def trace_backbone(name: str, stride: int = STRIDES[0]) -> Trace:
    """Trace BACKBONES[name], cut at a stride, on an image of SIZE px; once for each."""
    return _trace_backbone(name, stride)


@functools.cache
def _trace_backbone(name: str, stride: int) -> Trace:
    return trace(BACKBONES[name](stride=stride), SIZE, SIZE, 3)


def load_config(stem: str, variant: str = "") -> Any:
    """Return the model's part of configs/STEM.py:VARIANT."""
    return importlib.import_module(f"configs.{stem}").get_config(variant).model


def trace_rest(config: Any) -> Trace:
    """Trace what stands on the backbone of `config.model`, on the features of an image of SIZE px."""
    features = trace_backbone(config.backbone, config.stride).output.shape[1:]
    return trace(create_model(config).clone(backbone=Given()), *features)


def by_size(shape: tuple[int, ...]) -> str:
    """Write a shape as 7x7x1024; a scalar as 1."""
    return "x".join(map(str, shape)) or "1"


def make_table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Write a Markdown table; integers with thousands separators, on the right."""
    numeric = [all(isinstance(cell, int) for cell in column) for column in zip(*rows, strict=True)]
    lines = [header, ["--:" if right else "---" for right in numeric]]
    lines += [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_models() -> str:
    """List the eight models: what they are made of, how much they hold."""
    rows = []
    for stem, titles in TITLES.items():
        for title, variant in zip(titles, ("", "gap"), strict=True):
            config = load_config(stem, variant)
            backbone, rest = trace_backbone(config.backbone), trace_rest(config)
            params, stats = (backbone.count(kind) + rest.count(kind) for kind in ("params", "batch_stats"))
            name = f"{stem}:{variant}" if variant else stem
            rows.append(
                (title, f"`{name}`", f"`{config.backbone}`", f"`{config.pooling}`", f"`{config.head}`", params, stats)
            )
    return make_table(("model", "config", "backbone", "pooling", "head", "trainable", "statistics"), rows)


def table_backbones() -> str:
    """List the backbones: feature maps, geometry, sizes."""
    rows = []
    for name in NAMES:
        backbone, module = trace_backbone(name), BACKBONES[name]()
        params, stats = backbone.count("params"), backbone.count("batch_stats")
        features = by_size(backbone.output.shape[1:])
        geometry = module.stride, module.offset, module.min_size
        rows.append((f"`{name}`", features, *geometry, params, stats, params + stats))
    header = ("backbone", f"features at {SIZE}", "stride", "offset", "least side", "trainable", "statistics")
    return make_table((*header, "as Keras counts"), rows)


def table_strides() -> str:
    """List the whole networks and the cut ones: cells, where and how far one looks, sizes of the models with AMM."""
    rows = []
    for stem, stride in itertools.product(TITLES, STRIDES):
        config = load_config(stem, "" if stride == STRIDES[0] else f"stride{stride}")
        backbone, rest = trace_backbone(config.backbone, stride), trace_rest(config)
        module, features = create_model(config).backbone, backbone.output.shape[1:]
        field = find_field(backbone.jaxpr, 0)[0]
        if (field.stride, (field.low + field.high) / 2) != (module.stride, module.offset):
            raise ValueError(f"{stem} at {stride}: {field} is not centred where the network says")
        params, stats = (backbone.count(kind) + rest.count(kind) for kind in ("params", "batch_stats"))
        name = name_run({f"model.{key}": value for key, value in config.items()})
        rows.append((name, by_size(features), module.stride, module.offset, field.size, params, stats))
    header = ("model", f"features at {SIZE}", "stride", "offset", "field of view", "trainable", "statistics")
    return make_table(header, rows)


def table_layers(name: str) -> str:
    """List a backbone's parts from the image to the features; repeated parts share a row."""
    network = trace_backbone(name)
    groups: dict[str, list[Layer]] = {}
    for layer in network.layers:
        if layer.path and "." not in layer.path:
            groups.setdefault(re.sub(r"_\D*\d+$", "", layer.path) + describe(layer.module), []).append(layer)
    rows = []
    for group in groups.values():
        first, last = group[0], group[-1]
        paths = f"`{first.path}`" + (f" ... `{last.path}`" if len(group) > 1 else "")
        params, stats = (sum(network.count(kind, x.path) for x in group) for kind in ("params", "batch_stats"))
        rows.append((paths, describe(first.module), by_size(last.shape), params, stats))
    return make_table(("part", "what", f"output at {SIZE}", "trainable", "statistics"), rows)


def describe(module: nn.Module) -> str:
    """Say what a part is, with the numbers it was built with; a stage's stride is its first block's."""
    match module:
        case nn.Conv(kernel_size=(k, _), strides=s, use_bias=biased):
            return f"{k}x{k} convolution, stride {s}" + (", biased" if biased else "")
        case nn.BatchNorm():
            return "batch norm, ReLU"
        case densenet.DenseBlock():
            return f"dense block, {module.num_layers} layers"
        case densenet.Transition():
            return "1x1 convolution to half the channels, 2x2 average pool"
        case resnet.Bottleneck():
            return f"bottlenecks of width {module.num_features}"
        case inception_resnet_v2.ResidualBlock():
            return f"residual blocks, scale {module.scale:g}" + ("" if module.relu else ", no ReLU")
        case inception_resnet_v2.Branches():
            n = len(module.branches)
            return f"{n} parallel branches" if n > 1 else "convolutions and pools, 'valid' where they stride"
        case inception_resnet_v2.ConvNorm():
            return "1x1 convolution, batch norm, ReLU"
    raise TypeError(f"no words for {type(module).__name__}")


def table_amm() -> str:
    """List Table 3 on the features of DenseNet-121, row by row."""
    config = load_config("dense121")
    rest = trace_rest(config)
    shapes = {layer.path: layer.shape for layer in rest.layers}
    grid = rest.output[1]["features"].shape[1:3]
    shapes |= {"average_pool_2x2_same": (*grid, amm.WIDTHS[-1]), "gwap": rest.output[1]["pooled"].shape[1:]}
    shapes["classifier.logit"] = rest.output[0].shape[1:]
    rows, drops = [], iter((shapes["gwap"], shapes["classifier.dense1"]))
    for words, path in TABLE_3:
        shape = next(drops) if path == "classifier.drop" else shapes[path]
        rows.append((words, f"`{path}`", by_size(shape), rest.count("params", path), rest.count("batch_stats", path)))
    rows.append(("all", "", "", rest.count("params"), rest.count("batch_stats")))
    return make_table(("Table 3", "here", "output", "trainable", "statistics"), rows)


def table_numbers() -> str:
    """List the constants of the networks with their sources."""
    built = {name: BACKBONES[name]() for name in NAMES}
    dropout = load_config("dense121").dropout
    keras, widths = "Keras applications", ", ".join(map(str, amm.WIDTHS))
    rows = [
        ("widths of the attention branch", f"{widths}, 1", "Table 3"),
        ("epsilon of the attention branch's batch norm", f"{amm.EPSILON:g}", "Keras' default"),
        ("width of the head", str(cxa.HEAD_WIDTH), "Table 3"),
        ("dropout of the head", f"{dropout:g}, twice", "the public notebook that the attention block comes from"),
        ("layers of DenseNet-121", str(built["densenet121"].num_layers), "Huang et al. 2017, Table 1"),
        ("layers of DenseNet-201", str(built["densenet201"].num_layers), "Huang et al. 2017, Table 1"),
        ("growth, bottleneck of DenseNet", f"{densenet.GROWTH}, {densenet.BOTTLENECK}", "Huang et al. 2017"),
        ("blocks of ResNet-50", str(built["resnet50"].num_blocks), "He et al. 2016, Table 1"),
        ("expansion of ResNet-50", str(resnet.EXPANSION), "He et al. 2016"),
        ("blocks of Inception-ResNet-v2", str(built["inception_resnet_v2"].num_blocks), keras),
        ("epsilon, DenseNet and ResNet-50", f"{densenet.EPSILON:g}, {resnet.EPSILON:g}", keras),
        ("epsilon, Inception-ResNet-v2", f"{inception_resnet_v2.EPSILON:g}, no scale", keras),
        ("momentum of every batch norm", f"{load_config('dense121').batch_norm_momentum:g}", "Keras' default"),
        ("initialiser of every kernel", "Glorot uniform", "the paper, hyper-parameters"),
    ]
    return make_table(("number", "value", "source"), rows)


TABLES = {
    "models": table_models,
    "numbers": table_numbers,
    "backbones": table_backbones,
    "strides": table_strides,
    **{name: functools.partial(table_layers, name) for name in NAMES},
    "amm": table_amm,
}


def find_tables(text: str) -> dict[str, str]:
    """Return the tables of a page by name."""
    return dict(re.findall(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))


def main() -> None:
    """Rewrite the tables of the page."""
    text = PAGE.read_text()
    for name, old in find_tables(text).items():
        begin = f"<!-- table: {name} -->\n"
        text = text.replace(f"{begin}{old}\n<!-- end -->", f"{begin}{TABLES[name]()}\n<!-- end -->")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()

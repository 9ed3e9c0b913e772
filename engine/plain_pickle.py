"""Stand-ins for what checkpoints hold beside their weights: numpy's numbers, paths, dates, configurations.

No weight depends on these objects, and none of them is made: a pickle's names of harmless classes and functions mean
the stand-ins here, which take whatever a file gives them and keep nothing of it, so that no library sees its bytes.
Who reads refuses names that are not here.
"""

from collections import OrderedDict


class Inert:
    """Stands for an object, and for the function or class that would make it."""

    def __new__(cls, *_values: object) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *_values: object) -> None:
        """Keep nothing."""

    def __setstate__(self, _state: object) -> None:
        """Keep nothing."""


class Entries:
    """Stands for a class of mappings, which become plain ones: weights may lie in them."""

    def __new__(cls, *_values: object) -> OrderedDict:
        return OrderedDict()


class Items:
    """Stands for a class of lists, which become plain ones."""

    def __new__(cls, *_values: object) -> list:
        return []


def _of(module: str, names: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for name in names.split())


PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
NUMBERS = "bool_ bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128"
OBJECTS = (
    *(f"numpy.{core}.{name}" for core in ("core", "_core")
      for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")),
    *_of("numpy", f"ndarray dtype {NUMBERS}"),
    *_of("numpy.random._pickle", "__randomstate_ctor __generator_ctor __bit_generator_ctor"),
    *_of("numpy.random.bit_generator", "SeedSequence __pyx_unpickle_SeedSequence"),
    *_of("numpy.random._mt19937", "MT19937"),
    *_of("numpy.random._pcg64", "PCG64"),
    *_of("pathlib", PATHS),
    *_of("pathlib._local", PATHS),
    *_of("datetime", "datetime date time timedelta timezone"),
    *_of("decimal", "Decimal"),
    *_of("fractions", "Fraction"),
    *_of("uuid", "UUID SafeUUID"),
    *_of("types", "SimpleNamespace"),
    *_of("typing", "Any"),
    # Protocol 2's way to make objects of old classes, and to name a method of a class: here it names nothing.
    *_of("copyreg", "_reconstructor"),
    *_of("builtins", "object bool int float str bytes tuple frozenset slice range list dict getattr"),
    *_of("torch.torch_version", "TorchVersion"),
    *_of("mmengine.logging.history_buffer", "HistoryBuffer"),
    *_of("omegaconf.base", "Metadata ContainerMetadata"),
    *_of("omegaconf.dictconfig", "DictConfig"),
    *_of("omegaconf.listconfig", "ListConfig"),
    *_of("omegaconf.nodes", "AnyNode StringNode IntegerNode FloatNode BooleanNode PathNode"),
    *(f"{package}.callbacks.{name}" for package in ("pytorch_lightning", "lightning.pytorch")
      for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")),
)  # fmt: skip
MAPPINGS = (
    *_of("collections", "defaultdict UserDict"),
    *_of("addict.addict", "Dict"),
    *_of("easydict", "EasyDict"),
    *_of("yacs.config", "CfgNode"),
    *_of("fvcore.common.config", "CfgNode"),
    *_of("detectron2.config.config", "CfgNode"),
    *_of("mmcv.utils.config", "ConfigDict"),
    *_of("mmengine.config.config", "ConfigDict"),
    *_of("pytorch_lightning.utilities.parsing", "AttributeDict"),
    *_of("lightning_fabric.utilities.data", "AttributeDict"),
    *_of("lightning.fabric.utilities.data", "AttributeDict"),
)
STAND_INS: dict[str, type] = {  # by "module.name"
    **dict.fromkeys(OBJECTS, Inert),
    **dict.fromkeys(MAPPINGS, Entries),
    "collections.deque": Items,
}

"""The checkout is the package: `pip install -e .` makes every folder importable as `medssl.*`."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
FOLDERS = ["engine", "models", "losses", "datasets", "preprocess"]
SCRIPTS = ["train_c2l", "train_concl", "train_magical", "train_pcrl", "train_pcrlv2"]
SCRIPTS += ["train_byol", "train_densecl", "train_insdis", "train_moco", "train_pcl", "train_simclr"]
SCRIPTS += [
    "finetune_classification",
    "finetune_segmentation",
    "finetune_detection",
    "evaluate_features",
    "compare",
    "prepare_models",
    "export_encoder",
]
TOOLS = [
    "cache_images",
    "check_data",
    "get_samples",
    "luna",
    "make_lists",
    "make_phantom_ct",
    "slices",
    "tiles",
    "to_coco",
]

setup(
    name="medssl",
    version="0.1.0",
    description="Self-supervised pre-training for medical images, from raw files to an evaluated model",
    license="MIT",
    python_requires=">=3.10",
    package_dir={"medssl": "."},
    packages=["medssl", *(f"medssl.{folder}" for folder in FOLDERS)],
    package_data={"medssl.engine": ["report.html"]},
    install_requires=(HERE / "requirements.txt").read_text().split(),
    extras_require={
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "mkdocs>=1.6"],
        "export": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.31"],
    },
    entry_points={
        "console_scripts": [f"medssl-{name.replace('_', '-')} = medssl.{name}:cli" for name in SCRIPTS]
        + [f"medssl-{name.replace('_', '-')} = medssl.preprocess.{name}:cli" for name in TOOLS]
    },
)

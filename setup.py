"""Package the folders of this repository as subpackages of visionloom: train/ is imported as visionloom.train."""

from setuptools import find_packages, setup

FOLDERS = ["common", "parallel", "model", "data", "train", "recipes", "forecast", "launch"]

# Lower bounds are what the code needs, upper bounds the newest series tested; constraints.txt has the exact versions.
CORE = [
    "torch>=2.11,<2.16",
    "megatron-core>=0.19.2,<0.20",
    "psutil>=6.0,<8",  # imported by megatron-core, which does not declare it
    "transformers>=5.12,<6",
    "safetensors>=0.5,<1",
    "webdataset>=1.0,<2",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3,<2.4",
    "numpy>=2.1,<3",
    "pillow>=11.0,<14",
    "rich>=13.9,<16",
    "matplotlib>=3.9,<4",
    "wandb>=0.31,<0.32",  # login(prompt=False) asks without a dialogue
    "xxhash>=3.5,<5",
    "urllib3>=2.2,<3",
    "pydantic>=2.12,<3",
]
EXTRAS = {
    "video": ["av>=14.0,<20"],
    "jpeg": ["simplejpeg>=1.7,<2"],  # same pixels as Pillow, a fifth faster
    "deepspeed": ["deepspeed>=0.19.8,<0.20"],
    "flash": ["flash-attn-4>=4.0.0b36,<5", "liger-kernel>=0.8,<0.9"],
    "s3": ["s3fs>=2026.1,<2028", "fsspec>=2026.1,<2028"],
    "convert": ["pyarrow>=20,<26"],
    "demo": ["scikit-learn>=1.6,<2"],
    "tensorboard": ["tensorboard>=2.18,<3"],
}
EXTRAS["bench"] = [
    "megatron-energon>=7.4,<8"
]  # the peer of benchmarks/data, never imported elsewhere
EXTRAS["test"] = [
    *EXTRAS["demo"],
    *EXTRAS["video"],
    *EXTRAS["convert"],
    *EXTRAS["jpeg"],
    *EXTRAS["tensorboard"],
    *EXTRAS["deepspeed"],
    "pytest>=9.0,<10",
    "pytest-xdist>=3.8,<4",  # two halves of the tests side by side
    "hypothesis>=6.130,<7",
    "jsonschema>=4.23,<5",  # reference for data/shards/schema
    "scikit-image>=0.25,<0.27",  # pictures that lie in its package
    "torchvision>=0.26,<0.30",  # reference for resizing
    "peft>=0.21,<0.22",  # reference for adapters
    "trl>=1.16,<1.17",  # reference for losses of a policy
    "qwen-vl-utils>=0.0.14,<0.1",  # reference for frame and pixel rules
]
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.17,<0.18", "mypy>=2.4,<2.5", "import-linter>=2.16,<3"]

setup(
    name="visionloom",
    version="0.0.1",
    description="Train Qwen3-VL models: text, images and video woven into long sequences",
    license="Apache-2.0",
    python_requires=">=3.12",
    package_dir={f"visionloom.{folder}": folder for folder in FOLDERS},
    packages=[
        f"visionloom.{name}"
        for folder in FOLDERS
        for name in [folder, *(f"{folder}.{sub}" for sub in find_packages(folder))]
    ],
    package_data={
        "visionloom.recipes": ["**/*.yaml"],
        "visionloom.data.shards": ["schema/*.json"],
        "visionloom.forecast": ["*.yaml"],
        "visionloom.launch.submitting": ["*.sh"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["visionloom-pretrain = visionloom.launch.pretrain:main"]},
)

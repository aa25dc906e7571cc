from setuptools import find_packages, setup

setup(
    name="gnws_d2",
    version="0.1.0",
    description="Group Normalization + Weight Standardization detectors for Detectron2",
    license="Apache-2.0",
    packages=[*find_packages(include=["gnws_d2", "gnws_d2.*"]), "gnws_tools"],
    package_dir={"gnws_tools": "tools"},
    entry_points={"console_scripts": ["gnws = gnws_tools.cli:main"]},
    package_data={
        "gnws_d2.model_zoo": ["*.json", "configs/*.yaml"],
        "gnws_d2.report": ["*.html"],
    },
    python_requires=">=3.11",
    # Lowest versions alone: requirements.txt holds the versions that are known to work together.
    install_requires=[
        "detectron2",
        "fvcore",
        "hotcoco>=1.3",
        "iopath",
        "matplotlib",
        "numpy",
        "opencv-python",
        "Pillow",
        "pycocotools",
        "PyYAML",
        "tabulate",
        "torch>=2.4",
        "torchvision",
        "tqdm",
    ],
    # What single tools need besides.
    extras_require={
        "report": ["Jinja2"],
        "onnx": ["onnx", "onnxruntime"],
        "wandb": ["wandb"],
        "dev": [
            "hypothesis",
            "ipykernel",
            "mypy",
            "nbclient",
            "nbformat",
            "playwright",
            "pytest",
            "pytest-xdist",
            "ruff",
            "sahi",
            "supervision",
            "types-PyYAML",
            "uv",
        ],
    },
)

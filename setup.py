"""The one compiled file: the bicubic resize of ``chiasm.data.bicubic``. Everything else stands in pyproject.toml.

It is optional: without a C compiler, or on another processor than x86-64, the package installs without it and Pillow
resizes, with the same bits. The file is no Python module but a shared library that ctypes loads; it is built as an
extension because installers know how to build, place and skip those.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "chiasm.data._bicubic",
            ["src/chiasm/data/bicubic.c"],
            # Fused multiplications would change the last bit of a weight.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)

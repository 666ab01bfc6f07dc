"""The compiled files: the bicubic resize, the prediction of PNG, the int8 products of searches, the rounding of rows to
int8. Everything else stands in pyproject.toml.

They are optional: without a C compiler the package installs without them, Pillow resizes and decodes with the same bits
(also on another processor than x86-64), torch or fp32 searches and torch rounds with the same answer. The files are no
Python modules but shared libraries that ctypes loads; they are built as extensions because installers know how to build,
place and skip those.
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
        ),
        Extension(
            "chiasm.io._png",
            ["src/chiasm/io/png.c"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            optional=True,
        ),
        Extension(
            "chiasm.tasks._int8_scan",
            ["src/chiasm/tasks/int8_scan.c"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            optional=True,
        ),
        Extension(
            "chiasm.encoders.inference._int8_rows",
            ["src/chiasm/encoders/inference/int8_rows.c"],
            extra_compile_args=["-O3", "-fvisibility=hidden"],
            optional=True,
        ),
    ]
)

"""What pyproject.toml cannot say: configs/ is the package dual_loop.configs of an installed wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dual_loop", "dual_loop.*"]), "dual_loop.configs"],
    package_dir={"dual_loop.configs": "configs"},
    package_data={
        "dual_loop": ["py.typed", "assets/**/*", "schemas/*.json"],
        "dual_loop.configs": ["*.py", "_base_/*.py"],
    },
)

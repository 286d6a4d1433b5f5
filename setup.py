"""The packages of this project; everything else of it is in setup.cfg."""

from pathlib import Path

from setuptools import find_packages, setup

packages = find_packages(include=["vllm_sparsed", "vllm_sparsed.*"])
package_dir = {}
# vllm_sparsed/kernels is a link to kernels/. Archives and copies lose links: a zip file leaves a
# text file in its place. The package is then taken from the folder itself.
if not Path("vllm_sparsed/kernels").is_dir():
    package_dir["vllm_sparsed.kernels"] = "kernels"
    packages += ["vllm_sparsed.kernels"]
    packages += [f"vllm_sparsed.kernels.{name}" for name in find_packages("kernels")]

setup(packages=packages, package_dir=package_dir)

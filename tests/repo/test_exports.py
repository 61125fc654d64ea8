"""The packages export exactly the names in `__all__`."""

from importlib.metadata import version

import pytest

import ingine
from ingine import producer


@pytest.mark.parametrize("package", [ingine, producer], ids=lambda package: package.__name__)
def test_every_exported_name_is_there(package):
    for name in package.__all__:
        assert getattr(package, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ingine.no_such_name


@pytest.mark.parametrize("name", ["Client", "AsyncClient", "JobFailed", "QueueFull", "SamplingParams"])
def test_what_other_services_import(name):
    assert name in producer.__all__


def test_the_version_is_the_one_that_is_installed():
    assert ingine.__version__ == version("ingine-llm")

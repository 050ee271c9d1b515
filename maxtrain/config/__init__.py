"""What a run is: typed sections, layered YAML, and messages that say where a value came from and what is allowed."""

from maxtrain.config.errors import Refused
from maxtrain.config.loader import dump, load
from maxtrain.config.schema import Config

__all__ = ["Config", "Refused", "dump", "load"]

"""Models of the Hugging Face Hub by their names: their headers by range requests, or all of their files.

A model is given as a folder or as OWNER/NAME, OWNER/NAME@REVISION, OWNER/NAME:FILE.gguf. What lies here
under that name wins. One request says which commit a name means; everything after it asks for that commit.

`names` loads nothing; `fetch` has the verbs.
"""

from moequant.hub.names import GgufModel, HubModel, Model, Source, located, named

__all__ = ["GgufModel", "HubModel", "Model", "Source", "located", "named"]

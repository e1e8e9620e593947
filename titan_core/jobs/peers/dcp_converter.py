"""Converts a Hugging Face folder into a DCP checkpoint with what torch has for it: read all, write all."""

import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    source, target = sys.argv[1:]
    tensors = {}
    for name, entry in HuggingFaceStorageReader(source).read_metadata().state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(source), no_dist=True)
    dcp.save(tensors, checkpoint_id=target, no_dist=True)

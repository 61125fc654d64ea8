"""Loads a decoder from a folder of safetensors or of a GGUF file, without a second copy of all weights.

Each matrix is packed before the next one is read; for int4, each layer. An int8 model with a tied embedding
also keeps the matrix in bfloat16, for the embedding.
"""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ingine.engine.communication.parallel import SINGLE, TensorParallel, shard
from ingine.engine.files.model_files import gguf_weights
from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.layers.stored import DenseMatrix, GGUFMatrix, StoredMatrix
from ingine.engine.kernels.layers.weights import WeightFormat
from ingine.engine.kernels.native.memory import release_freed_memory
from ingine.engine.kernels.select import Kernels
from ingine.engine.models.checkpoint import EMBEDDING, HEAD, Checkpoint, SafetensorsCheckpoint, some
from ingine.engine.models.config import ModelConfig
from ingine.engine.models.decoder import Decoder, DecoderLayer
from ingine.engine.models.gguf_checkpoint import GGUFCheckpoint
from ingine.engine.models.importance import Probe
from ingine.engine.models.quantized_checkpoint import QuantizedCheckpoint
from ingine.engine.models.weight_shapes import expected_shapes
from ingine.errors import ConfigError

logger = logging.getLogger(__name__)

SPLIT_DIM = {
    "embed_tokens": 0,
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 0,
    "up_proj": 0,
    "down_proj": 1,
    "lm_head": 0,
}
"""The dimension of its weight by which a module is split over the ranks. 0: by outputs, as is its bias; 1: by
inputs, so that the ranks' results are summed. Other modules are whole on every rank."""


def load_model(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    parallel: TensorParallel = SINGLE,
) -> Decoder:
    """Load the model in the Hugging Face folder `path`, with weights in `dtype` on `device`, ready to run. If
    `parallel` has several ranks, load this rank's part.

    Raises ConfigError (or its UnsupportedModel) that names the file or the weights at fault.
    """
    model, checkpoint = _open(path, dtype, device, kernels, parallel)
    source = _Source(checkpoint, parallel)
    source.copy_into(model.norms())
    if kernels.weights.probe is not None and parallel.size == 1:
        _load_by_importance(model, source)
    else:
        for linear, names in model.linears().items():
            if _read(linear, names, source, kernels.weights):
                linear.pack(kernels.weights)
            release_freed_memory()
    matrices = source.matrices([EMBEDDING.removesuffix(".weight")]) if device.type == "cpu" else None
    if matrices is not None:
        source.note_mapped(matrices, [kernels.weights.keeps(matrices[0], dtype)])
        model.pack_stored_embedding(matrices[0])
    else:
        model.allocate_embedding()
        source.copy_into({EMBEDDING: model.embed_tokens})
        model.pack_embedding()
    release_freed_memory()
    model.mapped_bytes = source.mapped_bytes
    if source.kinds:
        kinds = ", ".join(f"{number} {kind}" for kind, number in source.kinds.most_common())
        logger.info("%s: quantised matrices: %s", path, kinds)
    return model


@torch.no_grad()
def _read(linear: Linear, names: list[str], source: "_Source", weights: WeightFormat) -> bool:
    """Read the weights of `linear`. Returns whether it has to be packed: quantised ones may be already."""
    matrices = source.matrices(names)
    if matrices is None:
        linear.allocate()
        source.copy_into(linear.parts(names))
        return True
    kept = [weights.keeps(matrix, linear.dtype) for matrix in matrices]
    is_cpu = linear.device.type == "cpu"
    for matrix, is_kept in zip(matrices, kept, strict=True):
        if not isinstance(matrix, DenseMatrix):
            note = "" if is_kept and (is_cpu or all(kept)) else " converted"
            source.kinds[f"{matrix.name}{note}"] += 1
    source.copy_into(linear.biases(names))
    if all(kept) or (any(kept) and is_cpu):
        source.note_mapped(matrices, kept)
        linear.pack_stored(weights, [matrix.to(linear.device) for matrix in matrices])
        return False
    # Made dense, and on the CPU, since not every device has the stored types. It is packed as a dense weight.
    linear.allocate()
    for target, matrix in zip(linear.weight.split(linear.out_features), matrices, strict=True):
        matrix.copy_to(target)
    return True


@torch.no_grad()
def _load_by_importance(model: Decoder, source: "_Source") -> None:
    """Load all linear layers, one decoder layer at a time, whose activations for a few tokens determine how
    its matrices are rounded.
    """
    weights, linears = model.kernels.weights, model.linears()
    probe: Probe | None = None
    to_run: list[DecoderLayer] = []  # layers without matrices to round, before the first layer that has one
    for layer in model.layers:
        own = [linear for linear in layer.modules() if isinstance(linear, Linear)]
        plain = [linear for linear in own if _read(linear, linears.pop(linear), source, weights)]
        if not plain:
            to_run.append(layer)
            continue
        probe = probe or _probe(model, source)
        for earlier in to_run:
            probe.run(earlier, [])
        to_run.clear()
        importances = probe.run(layer, plain)
        for linear in plain:
            linear.pack(weights, importances[linear])
        release_freed_memory()
    for linear, names in linears.items():
        if _read(linear, names, source, weights):
            linear.pack(weights)


def _probe(model: Decoder, source: "_Source") -> Probe:
    embed_tokens = torch.empty(model.embed_tokens.shape, dtype=model.dtype, device=model.device)
    source.copy_into({EMBEDDING: embed_tokens})
    return Probe(model, embed_tokens, model.kernels.weights.probe)


def load_weights(
    path: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    parallel: TensorParallel = SINGLE,
) -> Decoder:
    """Load a model as `load_model` does, but with unpacked weights, for `Decoder.checkpoint_tensors`."""
    model, checkpoint = _open(path, dtype, device, kernels, parallel)
    model.allocate_weights()
    _Source(checkpoint, parallel).copy_into(model.checkpoint_tensors())
    return model


def _open(
    path: Path, dtype: torch.dtype, device: torch.device, kernels: Kernels, parallel: TensorParallel
) -> tuple[Decoder, Checkpoint]:
    config, checkpoint = open_checkpoint(path)
    if config.tie_word_embeddings and checkpoint.has_a_head_of_its_own():
        logger.warning(
            "%s: %s and %s differ, so they are not tied, although config.json says tie_word_embeddings",
            *(path, EMBEDDING, HEAD),
        )
        config = replace(config, tie_word_embeddings=False)
    return Decoder(config, kernels, dtype=dtype, device=device, parallel=parallel).eval(), checkpoint


def open_checkpoint(path: Path) -> tuple[ModelConfig, Checkpoint]:
    """Open a model's config.json and its weights, of whose files only the headers are read.

    Raises ConfigError (or its UnsupportedModel) if no model could be loaded from them.
    """
    config = ModelConfig.from_folder(path)
    expected = expected_shapes(config)
    if (gguf_path := gguf_weights(path)) is not None:
        checkpoint = GGUFCheckpoint.of_folder(path, gguf_path, config)
    elif config.quantization is not None:
        with_head = {HEAD: expected[EMBEDDING]} | expected  # even a tied model may store one
        checkpoint = QuantizedCheckpoint(path, config.quantization, with_head)
    else:
        checkpoint = SafetensorsCheckpoint(path)
    _check_tensors(path, checkpoint, config, expected)
    return config, checkpoint


def _check_tensors(
    path: Path, checkpoint: Checkpoint, config: ModelConfig, expected: dict[str, list[int]]
) -> None:
    """Raise ConfigError unless the checkpoint has exactly the tensors of such a model: config.json alone must
    not cause allocations. `expected` has their shapes, and is changed.
    """
    stored = checkpoint.shape_of
    if _is_stored_as_head(checkpoint, config):
        expected[HEAD] = expected.pop(EMBEDDING)
    elif config.tie_word_embeddings and HEAD in stored:
        expected[HEAD] = expected[EMBEDDING]  # the same matrix once more
    if unexpected := stored.keys() - expected.keys():
        raise ConfigError(f"{path}: weights that this architecture has no place for: {some(unexpected)}")
    if missing := expected.keys() - stored.keys():
        raise ConfigError(f"{path}: weights are missing: {some(missing)}")
    for name, shape in stored.items():
        if shape != expected[name]:
            raise ConfigError(
                f"{checkpoint.file_of[name]}: {name} is {shape}, config.json says {expected[name]}"
            )


def _is_stored_as_head(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Return whether a tied matrix is stored under the name of the output matrix only."""
    return config.tie_word_embeddings and EMBEDDING not in checkpoint.file_of and HEAD in checkpoint.file_of


class _Source:
    """Reads this rank's part of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, parallel: TensorParallel):
        self._checkpoint, self._parallel = checkpoint, parallel
        self.kinds: Counter[str] = Counter()
        """Number of quantised matrices by kind, for the log."""
        self.mapped_bytes = 0

    def note_mapped(self, matrices: list[StoredMatrix], kept: list[bool]) -> None:
        """Add the bytes of `matrices` that stay in mapped files when they are packed."""
        pairs = zip(matrices, kept, strict=True)
        self.mapped_bytes += sum(
            one.data.nbytes for one, is_kept in pairs if is_kept and isinstance(one, GGUFMatrix)
        )

    def matrices(self, modules: list[str]) -> list[StoredMatrix] | None:
        """Return this rank's part of the weights of `modules`; None if none of them is stored quantised."""
        names = [f"{module}.weight" for module in modules]
        found = [self._matrix(name) for name in names]
        if not any(found):
            return None
        return [matrix or DenseMatrix(self._part(name)) for name, matrix in zip(names, found, strict=True)]

    def _matrix(self, name: str) -> StoredMatrix | None:
        matrix, dim = self._checkpoint.matrix(self._stored_as(name)), _split_dim(name)
        if matrix is None or dim is None or self._parallel.size == 1:
            return matrix
        if name in (EMBEDDING, HEAD):  # the last rank's part may have fewer rows
            return None
        try:
            return matrix.part(dim, shard(matrix.shape[dim], self._parallel.rank, self._parallel.size))
        except ValueError as reason:
            self.kinds[f"{matrix.name} converted ({reason})"] += 1
            return None

    @torch.no_grad()
    def copy_into(self, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's parts into `tensors`, by their Hugging Face names."""
        for name, target in tensors.items():
            self._copy(name, self._stored_as(name), target)

    def _part(self, name: str) -> Tensor:
        """Read this rank's part of a tensor that is split."""
        stored_as, dim = self._stored_as(name), _split_dim(name)
        own = shard(self._checkpoint.shape_of[stored_as][dim], self._parallel.rank, self._parallel.size)
        return self._checkpoint.read(stored_as, *dim * [slice(None)], own)

    def _stored_as(self, name: str) -> str:
        """Return the name under which a tensor is stored: a tied matrix may have its other name."""
        return name if name in self._checkpoint.shape_of else HEAD

    def _copy(self, name: str, stored_as: str, target: Tensor) -> None:
        dim = _split_dim(name)
        if dim is not None:
            part = self._part(name)
            length = part.shape[dim]
            target.narrow(dim, 0, length).copy_(part)
            target.narrow(dim, length, target.shape[dim] - length).zero_()  # padding rows of a vocabulary
        elif _is_added_to_a_sum(name) and self._parallel.rank > 0:
            target.zero_()
        else:
            target.copy_(self._checkpoint.read(stored_as))


def _split_dim(name: str) -> int | None:
    return None if _is_added_to_a_sum(name) else SPLIT_DIM.get(_module(name))


def _is_added_to_a_sum(name: str) -> bool:
    """Return whether this is a bias that only one rank may add, since the ranks' results are summed."""
    return name.endswith(".bias") and SPLIT_DIM.get(_module(name)) == 1


def _module(name: str) -> str:
    return name.split(".")[-2]

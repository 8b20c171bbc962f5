"""Triton's own model configuration message, in the text form that a repository holds."""

from typing import Any, TypeAlias

from msn_export.errors import MissingPackageError, SpecError

ModelConfig: TypeAlias = Any  # tritonclient.grpc.model_config_pb2.ModelConfig; it ships no types

# ONNX's spelling (graph.tensor_specs) to Triton's: server docs/user_guide/model_configuration.md
DATATYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float": "TYPE_FP32",
    "double": "TYPE_FP64",
}
SIZES = {"TYPE_BOOL": 1, "TYPE_UINT8": 1, "TYPE_INT8": 1, "TYPE_FP16": 2, "TYPE_BF16": 2,
         "TYPE_INT32": 4, "TYPE_FP32": 4, "TYPE_INT64": 8, "TYPE_FP64": 8}  # fmt: skip


def module() -> Any:
    """Import the generated module ``model_config_pb2``.

    Raises:
        MissingPackageError: tritonclient is not installed, or without its grpc part.
    """
    try:
        from tritonclient.grpc import model_config_pb2
    except (ModuleNotFoundError, RuntimeError) as error:
        raise MissingPackageError(
            "package tritonclient[grpc] is not installed; pip install 'msn-export[triton]'"
        ) from error
    return model_config_pb2


def to_text(config: ModelConfig, comment: str) -> str:
    """Write a configuration as ``config.pbtxt`` holds it, under a comment."""
    from google.protobuf import text_format

    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + str(text_format.MessageToString(config))


def from_text(text: str) -> ModelConfig:
    """Read a configuration.

    Raises:
        SpecError: it is none; the message has the line.
    """
    from google.protobuf import text_format

    config = module().ModelConfig()
    try:
        text_format.Parse(text, config)
    except (text_format.ParseError, RecursionError, UnicodeError) as error:
        raise SpecError(" ".join(str(error).split()) or type(error).__name__) from error
    return config


def datatype_name(config_value: int) -> str:
    """Give ``TYPE_FP32`` for its number; a number that Triton gives no meaning stays one."""
    known = module().DataType
    return str(known.Name(config_value) if config_value in known.values() else config_value)

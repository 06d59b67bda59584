"""What the .proto files say of themselves, with their comments."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
    SourceCodeInfo,
)
from grpc_tools import protoc

from docs.reference_text.table import UnsaidError, code, table

ROOT = Path(__file__).parent.parent.parent
Place: TypeAlias = tuple[int, ...]  # numbers of fields and indices, as SourceCodeInfo has it


@dataclass(frozen=True, slots=True)
class Proto:
    """One file, and where in it something is said."""

    file: FileDescriptorProto
    locations: Mapping[Place, SourceCodeInfo.Location]

    def said(self, *place: int) -> str:
        """Return what stands above, or beside, what is at a place."""
        one = self.locations.get(place, SourceCodeInfo.Location())
        return " ".join(f"{one.leading_comments} {one.trailing_comments}".split())


def of(name: str) -> Iterator[str]:
    """Give the services, messages and enums of a file in protos/."""
    proto = _read(name)
    yield from (proto.said(FileDescriptorProto.SYNTAX_FIELD_NUMBER), "")
    yield from (f"Package `{proto.file.package}`, file `protos/{name}.proto`.", "")
    for at, service in enumerate(proto.file.service):
        yield from _service(proto, service, (FileDescriptorProto.SERVICE_FIELD_NUMBER, at))
    for at, message in enumerate(proto.file.message_type):
        place = (FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, at)
        yield from _message(proto, message, place, "")
    for at, enum in enumerate(proto.file.enum_type):
        yield from _enum(proto, enum, (FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, at), "")


def _read(name: str) -> Proto:
    """Have protoc read a file with its comments."""
    with tempfile.NamedTemporaryFile() as out:
        options = ("--include_source_info", f"--descriptor_set_out={out.name}")
        if protoc.main(["", f"-I{ROOT}", *options, f"protos/{name}.proto"]):
            raise UnsaidError(f"protos/{name}.proto cannot be read")
        file = FileDescriptorSet.FromString(Path(out.name).read_bytes()).file[0]
    return Proto(file, {tuple(one.path): one for one in file.source_code_info.location})


def _service(proto: Proto, service: ServiceDescriptorProto, place: Place) -> Iterator[str]:
    yield from (f"## {service.name}", "", proto.said(*place), "")
    rows = []
    for at, method in enumerate(service.method):
        asked = ("stream " if method.client_streaming else "") + _link(method.input_type)
        told = ("stream " if method.server_streaming else "") + _link(method.output_type)
        words = proto.said(*place, ServiceDescriptorProto.METHOD_FIELD_NUMBER, at)
        rows.append((code(method.name), f"{asked} → {told}", words))
    yield from table(("method", "takes → answers", "meaning"), rows)


def _message(proto: Proto, message: DescriptorProto, place: Place, outer: str) -> Iterator[str]:
    name = f"{outer}{message.name}"
    maps = {one.name: one for one in message.nested_type if one.options.map_entry}
    yield from (f"({_target(name)})=", f"## {name}", "", proto.said(*place), "")
    rows = [
        (
            str(field.number),
            code(field.name),
            _type(field, maps),
            proto.said(*place, DescriptorProto.FIELD_FIELD_NUMBER, at),
        )
        for at, field in enumerate(message.field)
    ]
    yield from table(("number", "field", "type", "meaning"), rows) if rows else ("No fields.", "")
    for at, inner in enumerate(message.nested_type):
        if inner.name not in maps:
            inside = (*place, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, at)
            yield from _message(proto, inner, inside, f"{name}.")
    for at, enum in enumerate(message.enum_type):
        inside = (*place, DescriptorProto.ENUM_TYPE_FIELD_NUMBER, at)
        yield from _enum(proto, enum, inside, f"{name}.")


def _enum(proto: Proto, enum: EnumDescriptorProto, place: Place, outer: str) -> Iterator[str]:
    name = f"{outer}{enum.name}"
    yield from (f"({_target(name)})=", f"## {name}", "", proto.said(*place), "")
    rows = [
        (
            str(value.number),
            code(value.name),
            proto.said(*place, EnumDescriptorProto.VALUE_FIELD_NUMBER, at),
        )
        for at, value in enumerate(enum.value)
    ]
    yield from table(("number", "value", "meaning"), rows)


def _type(field: FieldDescriptorProto, maps: Mapping[str, DescriptorProto]) -> str:
    entry = maps.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        key, value = entry.field
        return f"map of {_scalar(key)} to {_scalar(value)}"
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return f"{'repeated ' if repeated else ''}{_scalar(field)}"


def _scalar(field: FieldDescriptorProto) -> str:
    if field.type_name:
        return _link(field.type_name)
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def _link(name: str) -> str:
    """Return a link to a type, by its full name with a dot before it."""
    return f"[{_local(name)}](#{_target(_local(name))})"


def _local(name: str) -> str:
    """Return a type's name without its package."""
    return name.removeprefix(".train_export.v1.").removeprefix(".inference.")


def _target(local: str) -> str:
    return f"proto-{local.lower().replace('.', '-')}"

"""How much work a serialised ModelInferRequest would be to parse, found without parsing it.

The parser holds the interpreter's lock. Thirty kilobytes of gzip can say a shape of millions of
dimensions, or millions of parameters, and keep every other request waiting for seconds. Only the
lengths of fields are read here, and only of messages that could take long.
"""

from service.errors import InvalidRequestError

SMALL_BYTES = 1 << 16  # parsed in a few milliseconds, whatever it says
MAX_FIELDS = 1 << 13
INPUTS, RAW_CONTENTS = 5, 7  # of ModelInferRequest
CONTENTS = 5  # of InferInputTensor
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
CONTINUES, DIGITS = 0x80, 0x7F  # of a varint's byte
MAX_VARINT_BYTES = 10


def check(content: bytes) -> None:
    """Refuse a message that is large, and not because of its tensors.

    Raises:
        InvalidRequestError: it has too many fields, or too many bytes beside its tensors' contents;
            or it is large and not a message at all.
    """
    if len(content) <= SMALL_BYTES:
        return
    fields, lines = 0, 0
    ends = [len(content)]  # of the message, and of the input that is looked into
    start = 0
    while ends:
        if start >= ends[-1]:
            ends.pop()
            continue
        key, begin = _varint(content, start)
        number, kind = key >> 3, key & 7
        end = _end(content, begin, kind)
        if not start < begin < end <= ends[-1]:
            raise InvalidRequestError(
                f"the request is not a ModelInferRequest: at byte {start} there is no field"
            )
        fields += 1
        inside = len(ends) > 1
        if kind == LENGTH and number == INPUTS and not inside:
            _, begin = _varint(content, begin)
            ends.append(end)
            end = begin
        elif kind != LENGTH or number != (CONTENTS if inside else RAW_CONTENTS):
            lines += end - start
        if fields > MAX_FIELDS or lines > SMALL_BYTES:
            raise InvalidRequestError(
                f"the request has {len(content)} bytes, and beside its tensors' contents more than "
                f"{SMALL_BYTES} bytes or {MAX_FIELDS} fields; expected names, shapes and parameters"
            )
        start = end


def _end(content: bytes, start: int, kind: int) -> int:
    """Return where the value ends that starts here; 0 if it cannot be one."""
    if kind == VARINT:
        return _varint(content, start)[1]
    if kind == LENGTH:
        size, begin = _varint(content, start)
        return begin + size if begin else 0
    return start + FIXED_BYTES[kind] if kind in FIXED_BYTES else 0


def _varint(content: bytes, start: int) -> tuple[int, int]:
    """Return a number and where it ends; 0 and 0 if there is none."""
    value = 0
    for place, byte in enumerate(content[start : start + MAX_VARINT_BYTES]):
        value |= (byte & DIGITS) << 7 * place
        if byte < CONTINUES:
            return value, start + place + 1
    return 0, 0

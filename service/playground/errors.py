"""What the page refuses, or has to do without; the text is the sentence that it shows."""

from service.errors import ServiceError


class PlaygroundError(ServiceError):
    """Something that the page was asked for cannot be had."""

"""Everything the service refuses on purpose.

ServiceError
├── InvalidRequestError    the request does not fit the model or the protocol
├── ModelNotFoundError     no such model or version in the repository
├── ModelNotReadyError     it is in the repository, but may not be served
├── BundleError            a bundle on disk is not what its manifest promises
├── ModelError             onnxruntime cannot load or run the model
├── RepositoryError        the repository has nothing to serve
├── SettingsError          an option has a value that cannot work
├── AddressError           the server cannot listen where it was told to
├── PictureError           a file is not a picture that can be shown to the model
└── ServerError            a client's call was refused, or nobody answered it

Nothing here knows about gRPC. `service.rpc.STATUS` gives the ones that reach a client their code.
"""


class ServiceError(Exception):
    """Base of all: its text is one finished sentence for the person who can mend it."""


class InvalidRequestError(ServiceError):
    """The request does not fit the model or the protocol; the same request will never work."""


class ModelNotFoundError(ServiceError):
    """No such model or version is in the repository."""


class ModelNotReadyError(ServiceError):
    """The model or version exists, but is still loading or was refused."""


class BundleError(ServiceError):
    """A bundle on disk is not what its manifest promises."""


class ModelError(ServiceError):
    """The model cannot be loaded or run by onnxruntime."""


class RepositoryError(ServiceError):
    """The repository is not there, or nothing in it can be served."""


class SettingsError(ServiceError):
    """An option has a value that cannot work."""


class AddressError(ServiceError):
    """The server cannot listen on the address it was given."""


class PictureError(ServiceError):
    """A file is not a picture that can be shown to the model."""


class ServerError(ServiceError):
    """A server refused a call, or none answered it.

    Attributes:
        code: gRPC's name of the status, such as `NOT_FOUND` or `UNAVAILABLE`.
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.code = code

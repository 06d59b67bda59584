"""Everything the service refuses on purpose.

ServiceError
├── InvalidRequestError    the request does not fit the model or the protocol
├── ModelNotFoundError     no such model or version in the repository
├── ModelNotReadyError     it is in the repository, but may not be served
├── OverloadedError        the queue is full, or the answer would come too late
├── QueueTimeoutError      the request waited as long as its queue policy allows
├── DeadlineError          the caller's deadline has passed
├── CancelledError         the caller no longer wants the answer
├── DrainingError          the server is stopping
├── UnimplementedError     this server does not do that
├── UnauthenticatedError   the call brought no token, or one that is not known
├── PermissionDeniedError  the call's token does not allow it
├── ControlError           models are not loaded and unloaded by request here
├── PreconditionError      the server is not in the state that the call needs
├── LimitError             as many calls of this kind are open as may be
├── LoadError              a model that was to be loaded failed its checks
├── BundleError            a bundle on disk is not what its manifest promises
├── ModelError             onnxruntime cannot load or run the model
├── RepositoryError        the repository has nothing to serve
├── SettingsError          an option has a value that cannot work
├── AddressError           the server cannot listen where it was told to
├── WorkerError            a worker process ended before it served
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


class OverloadedError(ServiceError):
    """There is no room to wait, or no hope to be answered in time.

    Attributes:
        retry_after_s: when to try again, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(ServiceError):
    """The request waited as long as its queue policy allows."""


class DeadlineError(ServiceError):
    """The caller's deadline has passed."""


class CancelledError(ServiceError):
    """The caller no longer wants the answer."""


class DrainingError(ServiceError):
    """The server is stopping and takes no new requests."""


class UnimplementedError(ServiceError):
    """This server does not do what the request asks for."""


class UnauthenticatedError(ServiceError):
    """The call brought no token, or one that is not known."""


class PermissionDeniedError(ServiceError):
    """The call's token does not allow it."""


class ControlError(ServiceError):
    """Models are not loaded and unloaded by request on this server."""


class PreconditionError(ServiceError):
    """The server, or the version, is not in the state that the call needs."""


class LimitError(ServiceError):
    """As many calls of this kind are open as may be at a time."""


class LoadError(ServiceError):
    """A model that was to be loaded failed its checks, or is not there."""


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


class WorkerError(ServiceError):
    """One of several server processes ended before it served."""


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

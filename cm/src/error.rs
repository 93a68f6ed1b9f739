//! Why a command is refused.

/// Why a command is refused; the names say what Linux's errno would.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// ENOENT.
    #[error("there is no such id")]
    NoSuchId,
    /// EINVAL.
    #[error("the id is on another event channel, or there is no such channel")]
    WrongChannel,
    /// EINVAL.
    #[error("not possible in the id's state")]
    WrongState,
    /// EINVAL.
    #[error("an argument is out of its range")]
    Invalid,
    /// EAFNOSUPPORT.
    #[error("addresses of this family are not served")]
    Family,
    /// EADDRINUSE.
    #[error("the address is in use")]
    AddressInUse,
    /// EADDRNOTAVAIL.
    #[error("the address is not one of this network namespace, or no port is free")]
    AddressNotAvailable,
    /// EISCONN.
    #[error("the connection is established already")]
    Connected,
    /// ENOMEM.
    #[error("the client has as many ids or channels as it may")]
    TooMany,
    /// ENOSYS.
    #[error("not supported")]
    Unsupported,
}

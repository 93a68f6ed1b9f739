//! The virtual RNIC, free of I/O.

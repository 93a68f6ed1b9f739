//! The two shapes that a word of verbs can have: one of several values, or a set of bits.
//!
//! Both take their numbers from C, both come from outside (an application, a peer process, a socket), so making one
//! from a number is checked and says what was wrong. What the words are is told in [`crate::verbs`].

use thiserror::Error;

/// A number that names nothing of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{value} is not a known {kind}")]
pub struct UnknownValue {
    /// What it should have been, such as `QP type`.
    pub kind: &'static str,
    /// What it was.
    pub value: u32,
}

/// A set with bits that mean nothing in its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{kind} have no bits {bits:#x}")]
pub struct UnknownBits {
    /// What the set should have been, such as `access flags`.
    pub kind: &'static str,
    /// The bits that are not known, and only those.
    pub bits: u32,
}

/// Writes `names` with `|` between them, `0` if there are none.
pub(crate) fn write_names(
    f: &mut std::fmt::Formatter<'_>,
    names: impl Iterator<Item = &'static str>,
) -> std::fmt::Result {
    let mut separator = "";
    for name in names {
        write!(f, "{separator}{name}")?;
        separator = "|";
    }
    if separator.is_empty() { f.write_str("0") } else { Ok(()) }
}

/// An enum whose values are those of C constants.
macro_rules! value_word {
    ($(#[$meta:meta])* $name:ident, $kind:literal {
        $($(#[$variant_meta:meta])* $variant:ident = $value:expr, $text:literal;)+
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[repr(u32)]
        pub enum $name {
            $($(#[$variant_meta])* $variant = $value,)+
        }

        impl $name {
            /// Every value there is.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The number that C uses.
            #[must_use]
            pub const fn value(self) -> u32 {
                self as u32
            }

            /// The field's name for it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl TryFrom<u32> for $name {
            type Error = $crate::words::UnknownValue;

            #[inline]
            fn try_from(value: u32) -> Result<Self, Self::Error> {
                $(if value == Self::$variant.value() {
                    return Ok(Self::$variant);
                })+
                Err($crate::words::UnknownValue { kind: $kind, value })
            }
        }

        impl From<$name> for u32 {
            #[inline]
            fn from(word: $name) -> u32 {
                word.value()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

/// A set of bits that are those of C constants; bits in `ignored` are dropped where the set is made.
macro_rules! flag_word {
    ($(#[$meta:meta])* $name:ident, $kind:literal, ignored $ignored:expr, {
        $($(#[$flag_meta:meta])* $flag:ident = $value:expr;)+
    }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "u32", into = "u32")]
        pub struct $name(u32);

        impl $name {
            $($(#[$flag_meta])* pub const $flag: Self = Self($value);)+

            /// Every bit that is known.
            pub const ALL: Self = Self($($value)|+);

            /// The set without bits.
            #[must_use]
            pub const fn empty() -> Self {
                Self(0)
            }

            /// The number that C uses.
            #[must_use]
            pub const fn bits(self) -> u32 {
                self.0
            }

            /// Whether no bit is set.
            #[must_use]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }

            /// Whether all of `other` is in this set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// Whether any of `other` is in this set.
            #[must_use]
            pub const fn intersects(self, other: Self) -> bool {
                self.0 & other.0 != 0
            }

            /// What is in either set.
            #[must_use]
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// What is in this set and not in `other`.
            #[must_use]
            pub const fn difference(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// The names of the bits that are set.
            pub fn names(self) -> impl Iterator<Item = &'static str> {
                [$((Self::$flag, stringify!($flag))),+]
                    .into_iter()
                    .filter(move |(flag, _)| self.contains(*flag))
                    .map(|(_, name)| name)
            }
        }

        impl TryFrom<u32> for $name {
            type Error = $crate::words::UnknownBits;

            #[inline]
            fn try_from(bits: u32) -> Result<Self, Self::Error> {
                let ignored: u32 = $ignored;
                match bits & !Self::ALL.0 & !ignored {
                    0 => Ok(Self(bits & Self::ALL.0)),
                    unknown => Err($crate::words::UnknownBits { kind: $kind, bits: unknown }),
                }
            }
        }

        impl From<$name> for u32 {
            #[inline]
            fn from(set: $name) -> u32 {
                set.0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            #[inline]
            fn bitor(self, other: Self) -> Self {
                self.union(other)
            }
        }

        impl std::ops::BitOrAssign for $name {
            #[inline]
            fn bitor_assign(&mut self, other: Self) {
                self.0 |= other.0;
            }
        }

        impl std::ops::BitAnd for $name {
            type Output = Self;

            #[inline]
            fn bitand(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                $crate::words::write_names(f, self.names())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

pub(crate) use {flag_word, value_word};

//! `Debug` for handles and builders: only the fields that distinguish one from another.

/// Implements `Debug` for a type with these fields. None of them may be a body or a secret.
macro_rules! opaque {
    ($type:ident $(<$life:lifetime>)?, |$it:ident| $($field:ident: $value:expr),*) => {
        impl std::fmt::Debug for $type $(<$life>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let $it = self;
                f.debug_struct(stringify!($type))
                    $(.field(stringify!($field), &$value))*
                    .finish_non_exhaustive()
            }
        }
    };
}

pub(crate) use opaque;

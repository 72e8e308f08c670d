//! Index types of tables that a puller and its owner share.

/// Position in a table.
pub(crate) trait Index: Copy + Eq {
    /// As an array index.
    fn at(self) -> usize;
}

macro_rules! index {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub(crate) struct $name(pub(crate) u16);

            impl $crate::pull::Index for $name {
                #[inline(always)]
                fn at(self) -> usize {
                    usize::from(self.0)
                }
            }

            impl $name {
                /// Every index of a table of `len` entries; the configuration bounds `len`.
                #[allow(dead_code, reason = "not every table is walked")]
                pub(crate) fn all(len: usize) -> impl DoubleEndedIterator<Item = $name> {
                    (0..u16::try_from(len).expect("tables have fewer than 65,536 entries")).map($name)
                }
            }
        )+
    };
}

pub(crate) use index;

index! {
    /// A PULL under way.
    AskIndex,
    /// A byte range being pulled.
    SpanIndex,
    /// The way to a peer that is pulled from.
    PathIndex,
}

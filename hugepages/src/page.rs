//! The page sizes an arena can stand on.

use std::fmt;
use std::str::FromStr;

use rustix::fs::MemfdFlags;

const GIB: usize = 1 << 30;
const MIB_2: usize = 2 << 20;

/// The pages that an arena got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageSize {
    /// Hugetlb pages of 1 GiB.
    Huge1G,
    /// Hugetlb pages of 2 MiB.
    Huge2M,
    /// The kernel's ordinary pages (4 KiB on x86).
    Base,
}

impl PageSize {
    /// Bytes in one page.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Huge1G => GIB,
            Self::Huge2M => MIB_2,
            Self::Base => rustix::param::page_size(),
        }
    }

    /// Whether these are hugetlb pages.
    #[must_use]
    pub fn is_huge(self) -> bool {
        self != Self::Base
    }

    pub(crate) fn memfd_flags(self) -> MemfdFlags {
        match self {
            Self::Huge1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
            Self::Huge2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            Self::Base => MemfdFlags::empty(),
        }
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Huge1G => f.write_str("1 GiB pages"),
            Self::Huge2M => f.write_str("2 MiB pages"),
            Self::Base => write!(f, "ordinary {} KiB pages", self.bytes() / 1024),
        }
    }
}

/// The pages that an arena should try for; smaller ones follow when there are not enough.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PageChoice {
    /// 1 GiB pages if rounding up to them wastes at most an eighth of what was asked, else 2 MiB, else ordinary.
    #[default]
    Auto,
    /// 1 GiB, else 2 MiB, else ordinary.
    Huge1G,
    /// 2 MiB, else ordinary.
    Huge2M,
    /// Ordinary pages only.
    Base,
}

impl PageChoice {
    /// The sizes to try for an arena of `bytes`, in order; never empty.
    pub(crate) fn candidates(self, bytes: usize) -> &'static [PageSize] {
        use PageSize::{Base, Huge1G, Huge2M};
        match self {
            Self::Auto if worth_1g(bytes) => &[Huge1G, Huge2M, Base],
            Self::Huge1G => &[Huge1G, Huge2M, Base],
            Self::Auto | Self::Huge2M => &[Huge2M, Base],
            Self::Base => &[Base],
        }
    }
}

fn worth_1g(bytes: usize) -> bool {
    bytes.checked_next_multiple_of(GIB).is_some_and(|rounded| rounded - bytes <= bytes / 8)
}

impl fmt::Display for PageChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Huge1G => "1g",
            Self::Huge2M => "2m",
            Self::Base => "base",
        })
    }
}

/// `{0:?} is not a page size: write auto, 1g, 2m or base`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a page size: write auto, 1g, 2m or base")]
pub struct ParsePageChoiceError(String);

impl FromStr for PageChoice {
    type Err = ParsePageChoiceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "auto" => Ok(Self::Auto),
            "1g" => Ok(Self::Huge1G),
            "2m" => Ok(Self::Huge2M),
            "base" => Ok(Self::Base),
            _ => Err(ParsePageChoiceError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_written_as_it_is_read() {
        for choice in [PageChoice::Auto, PageChoice::Huge1G, PageChoice::Huge2M, PageChoice::Base] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert_eq!("2G".parse::<PageChoice>(), Err(ParsePageChoiceError("2G".to_owned())));
    }

    #[test]
    fn auto_takes_1g_pages_only_where_they_waste_little() {
        let first = |bytes| PageChoice::Auto.candidates(bytes)[0];
        assert_eq!(first(1), PageSize::Huge2M);
        assert_eq!(first(GIB - 1), PageSize::Huge1G);
        assert_eq!(first(GIB), PageSize::Huge1G);
        assert_eq!(first(GIB + 1), PageSize::Huge2M);
        assert_eq!(first(15 * GIB + 1), PageSize::Huge1G);
        assert_eq!(first(usize::MAX), PageSize::Huge2M);
        assert_eq!(PageChoice::Base.candidates(GIB), &[PageSize::Base]);
    }
}

//! CRC32C (Castagnoli), as iSCSI and ext4 use it.

use crc_fast::{CrcAlgorithm, Digest};

/// CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// CRC32C of a message whose first part has the checksum `crc` and whose rest is `bytes`.
pub(crate) fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    // The register holds the complement of the checksum.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    #[expect(clippy::cast_possible_truncation, reason = "a checksum of 32 bits")]
    let crc = digest.finalize() as u32;
    crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    /// Bit by bit, as RFC 3720 defines it.
    fn slow(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, &byte| {
            (0..8)
                .fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
        })
    }

    proptest! {
        #[test]
        fn whole_and_in_parts_it_is_the_slow_twin(
            bytes in proptest::collection::vec(any::<u8>(), 0..3000), at in any::<proptest::sample::Index>(),
        ) {
            let expected = slow(&bytes);
            prop_assert_eq!(super::crc32c(&bytes), expected);
            let (first, rest) = bytes.split_at(at.index(bytes.len() + 1));
            prop_assert_eq!(super::crc32c_append(super::crc32c(first), rest), expected);
        }
    }
}

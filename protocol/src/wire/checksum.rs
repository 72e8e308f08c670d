//! The Internet checksum (RFC 1071), in 32-bit lanes so that the compiler vectorizes it.

/// A running one's-complement sum. Byte order does not matter to it (RFC 1071 section 2B), so native words are
/// added and only the 16-bit result is put into network order.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

/// Bytes folded per round: eight 64-bit lanes of one 32-bit word each.
const BLOCK: usize = 32;

impl Sum {
    /// Adds `bytes`, which must start at an even offset of what is summed; an odd tail is padded with zero.
    #[inline]
    #[must_use]
    pub fn with(self, bytes: &[u8]) -> Sum {
        let mut lanes = [0_u64; BLOCK / 4];
        let mut blocks = bytes.chunks_exact(BLOCK);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(4)) {
                *lane += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
            }
        }
        let mut total = lanes.iter().fold(self.0, |total, lane| total + lane);
        let mut pairs = blocks.remainder().chunks_exact(2);
        for pair in &mut pairs {
            total += u64::from(u16::from_ne_bytes([pair[0], pair[1]]));
        }
        if let [last] = pairs.remainder() {
            total += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        Sum(total)
    }

    /// Adds bytes that lie in several buffers, of any lengths.
    #[inline]
    #[must_use]
    pub fn with_parts<'a>(self, first: &[u8], rest: impl Iterator<Item = &'a [u8]>) -> Sum {
        let mut sum = self.with(first);
        let mut is_odd = first.len() % 2 == 1;
        for part in rest {
            // What begins at an odd offset has its bytes in the other halves of the words: the folded sum swaps with them.
            let folded = Sum::default().with(part).folded();
            sum = sum.with_u16(if is_odd { folded.swap_bytes() } else { folded });
            is_odd ^= part.len() % 2 == 1;
        }
        sum
    }

    /// Adds one 16-bit number given in host order.
    #[inline]
    #[must_use]
    pub fn with_u16(self, value: u16) -> Sum {
        Sum(self.0 + u64::from(value.to_be()))
    }

    /// The sum folded to 16 bits, in host order, not complemented: what hardware expects to find in the
    /// checksum field when it completes the checksum.
    #[inline]
    #[must_use]
    pub fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::from_be(u16::try_from(sum).unwrap_or(0xffff))
    }

    /// The checksum: the complement of the folded sum, in host order. Zero over data that carries its own
    /// checksum means that the data is intact.
    #[inline]
    #[must_use]
    pub fn checksum(self) -> u16 {
        !self.folded()
    }
}

/// Sum of the IPv4 or IPv6 pseudo header (RFC 768, RFC 8200 section 8.1): `addresses`, which lie side by side in
/// either header, protocol, UDP length.
#[inline]
pub fn pseudo_header(addresses: &[u8], protocol: u8, udp_bytes: u16) -> Sum {
    Sum::default().with(addresses).with_u16(u16::from(protocol)).with_u16(udp_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 word for word.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn example_of_rfc_1071() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().with(&bytes).folded(), 0xddf2);
    }

    proptest! {
        #[test]
        fn parts_of_any_length_sum_to_the_whole(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..100), 1..6)) {
            let sum = Sum::default().with_parts(&parts[0], parts[1..].iter().map(Vec::as_slice));
            // Zero has two forms.
            prop_assert_eq!(sum.checksum() % 0xffff, slow(&parts.concat()) % 0xffff);
        }

        #[test]
        fn equals_the_slow_twin(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cut in 0_usize..1500) {
            let cut = (cut * 2).min(bytes.len() / 2 * 2);
            let sum = Sum::default().with(&bytes[..cut]).with(&bytes[cut..]);
            prop_assert_eq!(sum.checksum(), slow(&bytes));
        }
    }
}

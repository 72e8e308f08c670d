//! Receive-side scaling: which queue a packet goes to.

use std::net::IpAddr;

/// How a port spreads received UDP packets over its queues.
///
/// The hash is Toeplitz over source and destination address and port in network order, as Microsoft's "Introduction to Receive Side
/// Scaling" defines it; its low bits choose an entry of the indirection table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rss {
    /// Secret key of the hash: 40 bytes, more on some devices.
    pub key: Vec<u8>,
    /// Indirection table: queue of each hash value modulo its length.
    pub reta: Vec<u16>,
}

/// Microsoft's key, which its verification vectors are made with: fixed, so that a port's steering is the same after each start.
pub(crate) const MICROSOFT_KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

impl Rss {
    /// The receive queue of a UDP packet from `src`:`sport` to `dst`:`dport`. `None` when the addresses are of different versions, or key
    /// or table are too short to tell.
    #[must_use]
    pub fn queue_for(&self, src: IpAddr, dst: IpAddr, sport: u16, dport: u16) -> Option<u16> {
        let hash = usize::try_from(self.hash(src, dst, sport, dport)?).ok()?;
        self.reta.get(hash.checked_rem(self.reta.len())?).copied()
    }

    /// The Toeplitz hash of a packet's addresses and ports.
    #[must_use]
    pub fn hash(&self, src: IpAddr, dst: IpAddr, sport: u16, dport: u16) -> Option<u32> {
        let mut input = [0_u8; 36];
        let addresses = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                input[..4].copy_from_slice(&src.octets());
                input[4..8].copy_from_slice(&dst.octets());
                8
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                input[..16].copy_from_slice(&src.octets());
                input[16..32].copy_from_slice(&dst.octets());
                32
            }
            _ => return None,
        };
        input[addresses..addresses + 2].copy_from_slice(&sport.to_be_bytes());
        input[addresses + 2..addresses + 4].copy_from_slice(&dport.to_be_bytes());
        toeplitz(&self.key, &input[..addresses + 4])
    }
}

/// For each bit of the input that is set, adds (XOR) the 32 bits of the key that start at that bit's position.
fn toeplitz(key: &[u8], input: &[u8]) -> Option<u32> {
    let (first, rest) = key.split_first_chunk::<4>()?;
    if rest.len() < input.len() {
        return None;
    }
    let mut window = u32::from_be_bytes(*first);
    let mut hash = 0;
    for (byte, next) in input.iter().zip(rest) {
        for bit in (0..8).rev() {
            if byte >> bit & 1 == 1 {
                hash ^= window;
            }
            window = window << 1 | u32::from(next >> bit & 1);
        }
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn microsoft() -> Rss {
        Rss { key: MICROSOFT_KEY.to_vec(), reta: (0..128).map(|entry| entry % 4).collect() }
    }

    /// "Verifying the RSS Hash Calculation", Windows driver documentation: destination, its port, source, its port, hash.
    #[test]
    fn microsofts_vectors() {
        let vectors = [
            ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x51cc_c178),
            ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xc626_b0ea),
            ("12.22.207.184", 38024, "24.19.198.95", 12898, 0x5c2b_394a),
            ("209.142.163.6", 2217, "38.27.205.30", 48228, 0xafc7_327f),
            ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x10e8_28a2),
            ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x4020_7d3d),
            ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0xdde5_1bbf),
            ("fe80::200:f8ff:fe21:67cf", 38024, "3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, 0x02d1_feef),
        ];
        for (dst, dport, src, sport, hash) in vectors {
            let (src, dst) = (src.parse().expect("address"), dst.parse().expect("address"));
            assert_eq!(microsoft().hash(src, dst, sport, dport), Some(hash), "{src} -> {dst}");
        }
    }

    #[test]
    fn nothing_to_go_by() {
        let (v4, v6) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([0_u16; 8]));
        assert_eq!(microsoft().queue_for(v4, v6, 1, 2), None);
        assert_eq!(Rss { key: vec![], reta: vec![0] }.queue_for(v4, v4, 1, 2), None);
        assert_eq!(Rss { key: vec![1; 39], reta: vec![0] }.queue_for(v6, v6, 1, 2), None);
        assert_eq!(Rss { key: vec![1; 40], reta: vec![] }.queue_for(v4, v4, 1, 2), None);
    }

    proptest! {
        #[test]
        fn same_hash_as_dpdk(key in prop::collection::vec(any::<u8>(), 40..=52), mut tuple in prop::array::uniform3(any::<u32>())) {
            let input: Vec<u8> = tuple.iter().flat_map(|word| word.to_be_bytes()).collect();
            // SAFETY: reads three words and 4 * 3 + 4 bytes of the key.
            let expected = unsafe { dpdk_sys::shim_softrss(tuple.as_mut_ptr(), 3, key.as_ptr()) };
            prop_assert_eq!(toeplitz(&key, &input), Some(expected));
        }
    }
}

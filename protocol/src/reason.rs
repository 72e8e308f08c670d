//! Why a received packet was dropped.

macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Everything a received packet can be dropped for, by either end, at any layer.
        ///
        /// In the data path a drop is a counter, never a log line: index an array of
        /// [`DropReason::COUNT`] counters with [`DropReason::index`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $variant,)+ }

        impl DropReason {
            /// Every reason, in index order.
            pub const ALL: &'static [DropReason] = &[$(DropReason::$variant,)+];
            /// How many reasons there are.
            pub const COUNT: usize = Self::ALL.len();

            /// Stable snake-case name, for metrics and `--json`.
            pub const fn name(self) -> &'static str {
                match self { $(DropReason::$variant => $name,)+ }
            }
        }
    };
}

drop_reasons! {
    /// Shorter than its own headers or lengths say.
    Truncated = "truncated",
    /// Neither ARP, IPv4 nor IPv6, or more than one VLAN tag.
    ForeignEthertype = "foreign_ethertype",
    /// Addressed to another MAC address.
    ForeignMac = "foreign_mac",
    /// Of another VLAN than ours, or of one although we have none.
    ForeignVlan = "foreign_vlan",
    /// An ARP packet that is not Ethernet/IPv4, or has an unknown operation or a multicast sender.
    BadArp = "bad_arp",
    /// IP version field contradicts the ethertype.
    BadIpVersion = "bad_ip_version",
    /// IPv4 header with options, or with a header length below 20.
    IpOptions = "ip_options",
    /// IP total or payload length is less than the headers or more than the frame.
    BadIpLength = "bad_ip_length",
    /// IPv4 header checksum does not match.
    BadIpChecksum = "bad_ip_checksum",
    /// A fragment; none is reassembled, so that segments must fit the MTU.
    Fragment = "fragment",
    /// Neither UDP nor anything else that is spoken here; IPv6 extension headers too.
    ForeignProtocol = "foreign_protocol",
    /// Addressed to another IP address, or from an address no host can have.
    ForeignIp = "foreign_ip",
    /// ICMP with a wrong checksum or length, or neighbour discovery that RFC 4861 (section 7.1) says to discard.
    BadIcmp = "bad_icmp",
    /// ICMP of a kind that is not understood, or about a packet that we did not send.
    ForeignIcmp = "foreign_icmp",
    /// UDP length field differs from what IP carries.
    BadUdpLength = "bad_udp_length",
    /// UDP checksum does not match, or is absent over IPv6.
    BadUdpChecksum = "bad_udp_checksum",
    /// Addressed to a UDP port that is not ours.
    ForeignPort = "foreign_port",
    /// From an address that is no known store. Counted by the caller, which knows the stores.
    UnknownPeer = "unknown_peer",
    /// Does not start with the protocol's magic number.
    BadMagic = "bad_magic",
    /// Another version of the protocol.
    BadVersion = "bad_version",
    /// Unknown message type, or one that this end never receives.
    BadType = "bad_type",
    /// Flags set that this version does not define, or a reserved field that is not zero.
    BadFlags = "bad_flags",
    /// Message length contradicts its type, its own counts, or what was asked for.
    BadLength = "bad_length",
    /// A field holds a value that the specification excludes.
    BadField = "bad_field",
    /// Tag or request id names nothing that is under way: late, duplicated or made up.
    Stale = "stale",
    /// Right tag, but from another store than was asked.
    WrongStore = "wrong_store",
    /// From another epoch of the store than was asked.
    StaleEpoch = "stale_epoch",
    /// Segment index beyond the range that the tag stands for.
    BadSegment = "bad_segment",
    /// Segment that has arrived before.
    Duplicate = "duplicate",
    /// The store's queue of pending requests is full; the receiver will ask again.
    QueueFull = "queue_full",
    /// No packet buffer was free to put a packet together that came in several.
    NoBuffer = "no_buffer",
}

impl DropReason {
    /// Position in [`DropReason::ALL`], below [`DropReason::COUNT`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn indices_are_positions_and_names_are_distinct() {
        let names: HashSet<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), DropReason::COUNT);
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position);
        }
    }
}

//! A fuzz target's input as numbers and bytes; what the tests of the crates replay corpora with includes this file too.
#![allow(dead_code, reason = "each target uses a part")]

/// Takes from the front of the input; what is not there is 0.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// A number below `end`, from one byte.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end.max(1)
    }

    /// A number of any size in few bytes: small ones, powers of two and what lies beside them, anything.
    pub(crate) fn number(&mut self) -> u64 {
        let how = self.byte();
        let power = 1_u64 << (how & 63);
        match how >> 6 {
            0 => u64::from(how),
            1 => power.wrapping_add(u64::from(self.byte())),
            2 => power.wrapping_sub(u64::from(self.byte())),
            _ => self.u64(),
        }
    }

    /// The next `n` bytes, or what is left.
    pub(crate) fn take(&mut self, n: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        front
    }

    /// `n` bytes, those that are left over and over again; they stay.
    pub(crate) fn cycle(&self, n: usize) -> Vec<u8> {
        if self.0.is_empty() { vec![0; n] } else { self.0.iter().copied().cycle().take(n).collect() }
    }

    /// Changes some bytes of `message`, its length, or nothing.
    pub(crate) fn damage(&mut self, message: &mut Vec<u8>) {
        let how = self.byte();
        let at = usize::from(self.byte()) % (message.len() + 1);
        let width = match how & 7 {
            0 => return,
            1 => return message.truncate(at),
            2 => return message.extend_from_slice(self.take(usize::from(how >> 3))),
            3 => {
                let flipped = self.byte();
                return message.get_mut(at).map_or((), |byte| *byte ^= flipped);
            }
            width => 1 << (width - 4),
        };
        let value = self.number().to_le_bytes();
        for (byte, value) in message.iter_mut().skip(at).zip(&value[..width]) {
            *byte = *value;
        }
    }
}

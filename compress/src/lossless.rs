//! Splitting 16-bit elements into their high and low bytes, and joining them again.
//!
//! The high byte of a float holds sign and exponent and is skewed; the low byte holds fraction bits and hardly is.
//! Apart, each gets Huffman codes of its own.

/// Appends the high bytes of little-endian 16-bit elements to `high` and their low bytes to `low`.
pub(crate) fn split(plane: &[u8], high: &mut Vec<u8>, low: &mut Vec<u8>) {
    high.extend(plane.chunks_exact(2).map(|element| element[1]));
    low.extend(plane.chunks_exact(2).map(|element| element[0]));
}

/// Writes elements joined from their bytes; `out` is twice as long as each of the others.
pub(crate) fn join(high: &[u8], low: &[u8], out: &mut [u8]) {
    for ((element, &high), &low) in out.chunks_exact_mut(2).zip(high).zip(low) {
        element.copy_from_slice(&[low, high]);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn join_undoes_split() {
        let plane: Vec<u8> = (0..=255).chain(3..=90).collect();
        let (mut high, mut low, mut joined) = (Vec::new(), Vec::new(), vec![0; plane.len()]);
        super::split(&plane, &mut high, &mut low);
        assert_eq!((high[0], low[0], high[1]), (1, 0, 3));
        super::join(&high, &low, &mut joined);
        assert_eq!(joined, plane);
    }
}

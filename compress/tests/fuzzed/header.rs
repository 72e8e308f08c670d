//! The header of a chunk.

use compress::{ChunkHeader, ChunkView, ENTRY_BYTES, FIXED_HEADER_BYTES, FORMAT_VERSION, MAGIC, crc32c};

/// The header of a chunk. The first byte says what of it is put right, so that what lies behind the checks is reached: bit 0 the magic number, the
/// version and the size of an entry, bit 1 the number of planes and the header's size, bit 2 the sizes and places of planes, bit 3 the checksum.
pub(crate) fn chunk(data: &[u8]) {
    let Some((&mend, rest)) = data.split_first() else { return };
    let mut header = rest.to_vec();
    mend_header(&mut header, mend);
    let Ok(announced) = ChunkView::announced_header_bytes(&header) else {
        assert!(ChunkView::parse(&header).is_err(), "a header that announces nothing, but parses");
        return;
    };
    let Ok(view) = ChunkView::parse(&header) else {
        assert!(ChunkHeader::parse(&header).is_err(), "the copy parses where the view does not");
        return;
    };
    let copy = ChunkHeader::parse(&header).expect("what the view parses");
    assert_eq!((view.header_bytes(), &copy.shape, &copy.key), (announced, view.shape(), view.key()));
    let shape = *view.shape();
    assert!(shape.check().is_ok() && copy.planes.len() == shape.planes());
    let mut end = announced as u64;
    for (index, entry) in view.planes().enumerate() {
        assert_eq!((Some(entry), copy.planes[index]), (view.plane(index), entry));
        assert!(entry.offset >= end, "plane {index} overlaps what is before it");
        end = entry.offset.checked_add(u64::from(entry.bytes)).expect("no plane wraps around");
        let section = entry.section(&shape).expect("what the table says was checked with it");
        if let Some(section) = section {
            let bytes = usize::try_from(entry.bytes).expect("32 bits");
            assert_eq!(section.start + section.compressed_bytes, bytes);
            assert!(section.compressed_bytes < section.bytes && section.bytes <= shape.plane_bytes());
        }
    }
    assert_eq!((end, view.plane(shape.planes())), (view.chunk_bytes(), None));
}

fn mend_header(header: &mut [u8], mend: u8) {
    if header.len() < FIXED_HEADER_BYTES {
        return;
    }
    if mend & 1 != 0 {
        header[..8].copy_from_slice(&MAGIC);
        header[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        header[10..12].copy_from_slice(&u16::try_from(ENTRY_BYTES).expect("small").to_le_bytes());
        header[57..60].fill(0);
        header[72..92].fill(0);
    }
    let planes = (header.len() - FIXED_HEADER_BYTES) / ENTRY_BYTES / 2 * 2;
    let header_bytes = FIXED_HEADER_BYTES + planes * ENTRY_BYTES;
    if mend & 2 != 0 {
        let layers = u16::try_from(planes / 2).unwrap_or(u16::MAX);
        header[12..16].copy_from_slice(&u32::try_from(header_bytes).unwrap_or(u32::MAX).to_le_bytes());
        header[48..50].copy_from_slice(&layers.to_le_bytes());
        header[60..64].copy_from_slice(&u32::try_from(planes).unwrap_or(u32::MAX).to_le_bytes());
    }
    if mend & 4 != 0 {
        let mut end = header_bytes as u64;
        for entry in header[FIXED_HEADER_BYTES..].chunks_exact_mut(ENTRY_BYTES).take(planes) {
            let gap = u64::from(entry[0] & 3);
            entry[..8].copy_from_slice(&(end + gap).to_le_bytes());
            end += gap + u64::from(u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]));
        }
        header[64..72].copy_from_slice(&end.to_le_bytes());
    }
    if mend & 8 != 0 {
        let stated = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
        let covered = usize::try_from(stated).unwrap_or(usize::MAX).clamp(FIXED_HEADER_BYTES, header.len());
        header[92..96].fill(0);
        let crc = crc32c(&header[..covered]);
        header[92..96].copy_from_slice(&crc.to_le_bytes());
    }
}

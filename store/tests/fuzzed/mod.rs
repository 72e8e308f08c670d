//! What the fuzz target `kv_file` runs, and what its corpus is replayed with: files that somebody else wrote.
//!
//! Whoever includes this has the module [`store::kv_file`] under that name at its root: the target takes the file alone, since the rest of the store links DPDK.

use std::cell::RefCell;
use std::io::{Seek, Write};

use compress::{CHUNK_TOKENS, Side};
use tempfile::NamedTempFile;

use crate::kv_file::{KvFile, read_tokens};

thread_local! {
    static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().expect("a temporary file"));
}

/// A file, or with an even first byte a header to be put behind its length and before as many times eight bytes as the rest of that byte says. It is refused with a
/// reason, or every plane that it says it has can be read.
pub(crate) fn kv_file(data: &[u8]) {
    let Some((&how, rest)) = data.split_first() else { return };
    let bytes = if how & 1 == 0 {
        [&(rest.len() as u64).to_le_bytes(), rest, &vec![how; usize::from(how >> 1) * 8]].concat()
    } else {
        rest.to_vec()
    };
    FILE.with_borrow_mut(|file| {
        file.as_file().set_len(0).expect("a file of our own");
        file.rewind().expect("a file of our own");
        file.write_all(&bytes).expect("a file of our own");
        check(file.path(), bytes.len());
    });
}

fn check(path: &std::path::Path, file_bytes: usize) {
    let file = match KvFile::open(path) {
        Ok(file) => file,
        Err(error) => return assert!(error.to_string().contains(&*path.to_string_lossy())),
    };
    let shape = file.shape();
    assert!(shape.tensor_bytes() <= file_bytes && file.tokens().len() == shape.tokens);
    assert_eq!(read_tokens(path).expect("it was read before"), file.tokens());
    let (mut plane, mut tokens) = (Vec::new(), 0);
    for chunk in 0..shape.chunks() {
        let of_chunk = usize::from(shape.chunk(chunk).tokens);
        assert!((1..=CHUNK_TOKENS).contains(&of_chunk));
        tokens += of_chunk;
        for layer in [0, shape.layers - 1] {
            for side in [Side::K, Side::V] {
                file.read_plane(chunk, layer, side, &mut plane).expect("the file has it");
                assert_eq!(plane.len(), of_chunk * shape.row_bytes());
            }
        }
    }
    assert_eq!(tokens, shape.tokens);
}

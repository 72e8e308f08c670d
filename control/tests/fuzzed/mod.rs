//! What the fuzz target `control` runs, and what its corpus is replayed with: bytes that a client or a data plane finds in a ring the other can write.

use control::RegionView;
use control::codec::{decode_command, decode_completion, encode};
use control::message::MAX_MESSAGE_BYTES;

/// A command or a completion, as the first byte says: whatever it is, it is refused or it means the same after being written and read again, and the
/// check of a command does not panic.
pub(crate) fn message(data: &[u8]) {
    let Some((&kind, bytes)) = data.split_first() else { return };
    let mut again = Vec::new();
    if kind & 1 == 0 {
        let Ok(command) = decode_command(bytes) else { return };
        let region = (kind & 2 != 0).then_some(RegionView::Host(1 << 20));
        // Refused or not: it must come to a decision.
        let _ = command.check(|_| region);
        encode(&command, &mut again);
        assert_eq!(decode_command(&again).as_ref(), Ok(&command));
    } else {
        let Ok(mut completion) = decode_completion(bytes) else { return };
        completion.cut_texts();
        encode(&completion, &mut again);
        assert!(again.len() <= MAX_MESSAGE_BYTES || bytes.len() > MAX_MESSAGE_BYTES);
        assert_eq!(decode_completion(&again).as_ref(), Ok(&completion));
    }
}

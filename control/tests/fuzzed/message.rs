//! Messages, out of a ring or a socket.

use std::fmt::Debug;

use control::codec::{decode_command, decode_completion, encode};
use control::handshake::{FromClient, FromDataPlane, datagram, parse};
use control::message::MAX_MESSAGE_BYTES;
use control::{
    DeviceUuid, ElementType, GpuAllocation, IpcHandle, LayerBase, PageStrides, PagedKv, PlaneBase,
    RegionView, RingKv,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

const ALLOCATION: GpuAllocation =
    GpuAllocation { handle: IpcHandle::from_halves([[0; 32]; 2]), bytes: 1 << 20 };

/// A cache of one layer and 64 pages.
fn pages() -> PagedKv {
    let strides = PageStrides::nhd(16, 2, 64, ElementType::Bf16);
    PagedKv {
        device: DeviceUuid([0; 16]),
        allocations: vec![ALLOCATION],
        element: ElementType::Bf16,
        page_tokens: 16,
        pages: 64,
        kv_heads: 2,
        head_dim: 64,
        k: strides,
        v: strides,
        layers: vec![LayerBase { k: PlaneBase::new(0, 0), v: PlaneBase::new(0, 1 << 19) }],
    }
}

fn ring() -> RingKv {
    RingKv {
        device: DeviceUuid([0; 16]),
        allocation: ALLOCATION,
        element: ElementType::Bf16,
        offset: 0,
        entry_bytes: 1 << 16,
        entries: 16,
        generation: 0,
    }
}

/// A message, as the first byte says: bits 0 and 1 which, bits 2 and 3 what a command's region is. Whatever it is, it is refused or it means the same after
/// being written and read again, and checks come to a decision.
pub(crate) fn message(data: &[u8]) {
    let Some((&kind, bytes)) = data.split_first() else { return };
    let mut again = Vec::new();
    match kind & 3 {
        0 => {
            let Ok(command) = decode_command(bytes) else { return };
            let (pages, ring) = (pages(), ring());
            let region = match kind >> 2 & 3 {
                0 => None,
                1 => Some(RegionView::Host(1 << 20)),
                2 => Some(RegionView::Pages(&pages)),
                _ => Some(RegionView::Ring(&ring)),
            };
            if let Err(error) = command.check(|_| region) {
                assert!(!error.to_string().is_empty());
            }
            encode(&command, &mut again);
            assert_eq!(decode_command(&again).as_ref(), Ok(&command));
        }
        1 => {
            let Ok(mut completion) = decode_completion(bytes) else { return };
            completion.cut_texts();
            encode(&completion, &mut again);
            assert!(again.len() <= MAX_MESSAGE_BYTES || bytes.len() > MAX_MESSAGE_BYTES);
            assert_eq!(decode_completion(&again).as_ref(), Ok(&completion));
        }
        2 => {
            if let Some(FromClient::RegisterGpu { memory, .. }) = socket::<FromClient>(bytes)
                && let Err(error) = memory.check()
            {
                assert!(!error.to_string().is_empty());
            }
        }
        _ => drop(socket::<FromDataPlane>(bytes)),
    }
}

/// The body of a datagram behind a right header.
fn socket<T: Serialize + DeserializeOwned + PartialEq + Debug>(body: &[u8]) -> Option<T> {
    // The shortest message has the same header as any.
    let header = datagram(&FromClient::Attached);
    let header = &header[..header.len() - 1];
    assert!(parse::<T>(body).is_err() || body.starts_with(header), "a message without its header");
    let read = parse::<T>(&[header, body].concat()).ok()?;
    assert_eq!(parse::<T>(&datagram(&read)).as_ref(), Ok(&read));
    Some(read)
}

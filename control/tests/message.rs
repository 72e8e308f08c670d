//! Messages there and back, and bytes that are none.

use control::codec::{decode_command, decode_completion, encode};
use control::message::{
    MAX_CHUNKS_PER_FETCH, MAX_KEYS_PER_LOOKUP, MAX_MESSAGE_BYTES, MAX_PAGES_PER_FETCH, MAX_STATS_BYTES,
    MAX_TEXT_BYTES, MAX_TIMEOUT_MS,
};
use control::{
    ChunkPlace, Codec, Command, CommandError, Completion, DecodeError, DeviceUuid, Dtype, ElementType,
    GpuAllocation, IpcHandle, LayerBase, Layout, Missing, MissingReason, Outcome, PageStrides, PagedKv,
    PlaneBase, RegionView, RingKv, Shape, Target,
};
use proptest::prelude::*;

const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, head_dim: 4, dtype: Dtype::Bf16 };

fn fetch(chunks: Vec<ChunkPlace>) -> Command {
    Command::Fetch {
        id: u64::MAX,
        timeout_ms: MAX_TIMEOUT_MS,
        region: u32::MAX,
        to: Target::Host { layout: Layout::chunked(&SHAPE, 256), out_dtype: Dtype::F16 },
        shape: SHAPE,
        chunks,
        progress: true,
    }
}

fn fetch_to(to: Target, chunks: Vec<ChunkPlace>) -> Command {
    let Command::Fetch { id, timeout_ms, region, shape, progress, .. } = fetch(vec![]) else {
        unreachable!()
    };
    Command::Fetch { id, timeout_ms, region, to, shape, chunks, progress }
}

/// A cache of 10 pages of 16 tokens, of the shape above.
fn cache() -> PagedKv {
    let strides = PageStrides::nhd(16, 2, 4, ElementType::Bf16);
    let base = |offset| PlaneBase::new(0, offset);
    PagedKv {
        device: DeviceUuid([3; 16]),
        allocations: vec![GpuAllocation { handle: IpcHandle::new([9; 64]), bytes: 4 * 10 * strides.page }],
        element: ElementType::Bf16,
        page_tokens: 16,
        pages: 10,
        kv_heads: 2,
        head_dim: 4,
        k: strides,
        v: strides,
        layers: (0..2)
            .map(|layer| LayerBase {
                k: base(layer * 20 * strides.page),
                v: base((layer * 20 + 10) * strides.page),
            })
            .collect(),
    }
}

fn ring() -> RingKv {
    RingKv {
        device: DeviceUuid([3; 16]),
        allocation: GpuAllocation { handle: IpcHandle::new([9; 64]), bytes: 1024 },
        element: ElementType::F16,
        offset: 0,
        entry_bytes: 512,
        entries: 2,
        generation: 0,
    }
}

fn commands() -> impl Strategy<Value = Command> {
    let place = (any::<[u8; 32]>(), any::<u16>(), any::<u64>())
        .prop_map(|(key, tokens, offset)| ChunkPlace { key, tokens, offset });
    prop_oneof![
        (any::<u64>(), prop::collection::vec(any::<[u8; 32]>(), 0..20), any::<u32>())
            .prop_map(|(id, keys, timeout_ms)| Command::Lookup { id, keys, timeout_ms }),
        prop::collection::vec(place.clone(), 0..20).prop_map(fetch),
        (prop::collection::vec(any::<u32>(), 0..20), prop::collection::vec(place.clone(), 0..4))
            .prop_map(|(table, chunks)| fetch_to(Target::Pages { table }, chunks)),
        prop::collection::vec(place, 0..4).prop_map(|chunks| fetch_to(Target::Ring, chunks)),
        any::<u64>().prop_map(|id| Command::Cancel { id }),
        any::<(u64, u32)>().prop_map(|(id, region)| Command::Unregister { id, region }),
        any::<u64>().prop_map(|id| Command::Stats { id }),
    ]
}

fn completions() -> impl Strategy<Value = Completion> {
    let missing = any::<u32>().prop_map(|chunk| Missing { chunk, reason: MissingReason::StoreUnreachable });
    prop_oneof![
        (any::<(u64, u64)>(), 1..20_u32, 1..=256_u16).prop_map(
            |((id, encoded_bytes), found, last_tokens)| {
                let (shape, codec) = (Some(SHAPE), Some(Codec::Int4));
                Completion::LookedUp { id, found, last_tokens, encoded_bytes, shape, codec }
            }
        ),
        any::<(u64, String)>().prop_map(|(id, message)| Completion::LookupFailed { id, message }),
        any::<(u64, u32, u64, u64)>().prop_map(|(id, planes, encoded_bytes, delivered_bytes)| {
            Completion::Progress { id, planes, encoded_bytes, delivered_bytes }
        }),
        (any::<(u64, u32, String)>(), prop::collection::vec(missing, 0..20)).prop_map(
            |((id, planes, message), missing)| Completion::Ended {
                id,
                outcome: Outcome::Failed,
                planes,
                encoded_bytes: 1,
                delivered_bytes: 2,
                missing,
                message,
            }
        ),
        any::<(u64, String)>().prop_map(|(id, json)| Completion::Stats { id, json }),
    ]
}

proptest! {
    #[test]
    fn commands_come_back(command in commands()) {
        let mut bytes = Vec::new();
        encode(&command, &mut bytes);
        prop_assert_eq!(decode_command(&bytes), Ok(command));
        let whole = bytes.clone();
        bytes.push(0);
        prop_assert_eq!(decode_command(&bytes), Err(DecodeError::Trailing { bytes: 1 }));
        for end in 0..whole.len() {
            prop_assert!(decode_command(&whole[..end]).is_err(), "cut at {}", end);
        }
    }

    #[test]
    fn completions_come_back(completion in completions()) {
        let mut bytes = Vec::new();
        encode(&completion, &mut bytes);
        prop_assert_eq!(decode_completion(&bytes), Ok(completion));
        for end in 0..bytes.len() {
            prop_assert!(decode_completion(&bytes[..end]).is_err(), "cut at {}", end);
        }
    }

    /// Any bytes: a message that encodes to the same meaning, or an error.
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut again = Vec::new();
        if let Ok(command) = decode_command(&bytes) {
            encode(&command, &mut again);
            prop_assert_eq!(decode_command(&again), Ok(command.clone()));
            let (cache, ring) = (cache(), ring());
            for view in [RegionView::Host(1 << 20), RegionView::Pages(&cache), RegionView::Ring(&ring)] {
                let _ = command.check(|_| Some(view));
            }
        }
        if let Ok(completion) = decode_completion(&bytes) {
            encode(&completion, &mut again);
            prop_assert_eq!(decode_completion(&again), Ok(completion));
        }
    }

    /// A command with one byte changed still decodes to something that is checked without a panic.
    #[test]
    fn flipped_bytes_are_survived(command in commands(), at in any::<prop::sample::Index>(), value: u8) {
        let mut bytes = Vec::new();
        encode(&command, &mut bytes);
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(command) = decode_command(&bytes) {
            let cache = cache();
            let _ = command.check(|region| (region == u32::MAX).then_some(RegionView::Host(4096)));
            let _ = command.check(|_| Some(RegionView::Pages(&cache)));
        }
    }
}

#[test]
fn a_length_that_lies_allocates_nothing() {
    // A lookup (variant 0), id 0, and a list that claims 2^63 keys.
    let mut bytes = vec![0, 0];
    bytes.extend_from_slice(&[0x80; 9]);
    bytes.push(1);
    assert!(matches!(decode_command(&bytes), Err(DecodeError::Malformed { .. })));
    let long = vec![0; MAX_MESSAGE_BYTES + 1];
    assert_eq!(decode_command(&long), Err(DecodeError::TooLong { bytes: MAX_MESSAGE_BYTES + 1 }));
}

#[test]
fn the_longest_messages_fit() {
    let place = ChunkPlace { key: [255; 32], tokens: 256, offset: u64::MAX };
    let lookup = Command::Lookup {
        id: u64::MAX,
        keys: vec![[255; 32]; MAX_KEYS_PER_LOOKUP],
        timeout_ms: MAX_TIMEOUT_MS,
    };
    let mut bytes = Vec::new();
    let pages = Target::Pages { table: vec![u32::MAX; MAX_PAGES_PER_FETCH] };
    let paged = fetch_to(pages, vec![place; MAX_CHUNKS_PER_FETCH]);
    for command in [fetch(vec![place; MAX_CHUNKS_PER_FETCH]), paged, lookup] {
        encode(&command, &mut bytes);
        assert!(bytes.len() <= MAX_MESSAGE_BYTES, "{}", bytes.len());
        assert_eq!(decode_command(&bytes), Ok(command));
    }
    let missing = Missing { chunk: u32::MAX, reason: MissingReason::Cancelled };
    for completion in [
        Completion::LookedUp {
            id: u64::MAX,
            found: 4096,
            last_tokens: 256,
            encoded_bytes: u64::MAX,
            shape: Some(SHAPE),
            codec: Some(Codec::Int4),
        },
        Completion::Ended {
            id: u64::MAX,
            outcome: Outcome::Failed,
            planes: u32::MAX,
            encoded_bytes: u64::MAX,
            delivered_bytes: u64::MAX,
            missing: vec![missing; MAX_CHUNKS_PER_FETCH],
            message: "x".repeat(MAX_TEXT_BYTES),
        },
        Completion::Stats { id: u64::MAX, json: "x".repeat(MAX_STATS_BYTES) },
    ] {
        encode(&completion, &mut bytes);
        assert!(bytes.len() <= MAX_MESSAGE_BYTES, "{}", bytes.len());
        assert_eq!(decode_completion(&bytes), Ok(completion));
    }
}

#[test]
fn completions_that_contradict_themselves_are_refused() {
    let looked_up = |found, last_tokens, shape, codec| Completion::LookedUp {
        id: 1,
        found,
        last_tokens,
        encoded_bytes: 1,
        shape,
        codec,
    };
    let ended = |outcome| Completion::Ended {
        id: 1,
        outcome,
        planes: 0,
        encoded_bytes: 0,
        delivered_bytes: 0,
        missing: vec![Missing { chunk: 0, reason: MissingReason::NotStored }],
        message: String::new(),
    };
    let empty = Shape { layers: 0, ..SHAPE };
    let mut bytes = Vec::new();
    for (completion, sound) in [
        (looked_up(0, 0, None, None), true),
        (looked_up(1, 256, Some(SHAPE), Some(Codec::Raw)), true),
        (looked_up(4097, 256, Some(SHAPE), Some(Codec::Raw)), false),
        (looked_up(1, 0, Some(SHAPE), Some(Codec::Raw)), false),
        (looked_up(0, 1, None, None), false),
        (looked_up(1, 256, None, Some(Codec::Raw)), false),
        (looked_up(1, 256, Some(empty), Some(Codec::Raw)), false),
        (looked_up(1, 256, Some(SHAPE), None), false),
        (looked_up(1, 257, Some(SHAPE), Some(Codec::Raw)), false),
        (ended(Outcome::Failed), true),
        (ended(Outcome::Done), false),
    ] {
        encode(&completion, &mut bytes);
        let result = decode_completion(&bytes);
        assert_eq!(result.is_ok(), sound, "{completion:?}: {result:?}");
    }
}

#[test]
fn what_a_command_may_not_ask() {
    let place = ChunkPlace { key: [0; 32], tokens: 256, offset: 0 };
    let chunk_bytes = SHAPE.chunk_bytes(256);
    let region = |region| (region == u32::MAX).then_some(RegionView::Host(chunk_bytes + 2));
    let check = |chunks| fetch(chunks).check(region);
    assert_eq!(check(vec![place]), Ok(()));
    assert_eq!(check(vec![ChunkPlace { offset: 2, ..place }]), Ok(()));
    assert_eq!(check(vec![]), Err(CommandError::ChunkCount { chunks: 0 }));
    assert_eq!(check(vec![place; 4097]), Err(CommandError::ChunkCount { chunks: 4097 }));
    let zero = ChunkPlace { tokens: 0, ..place };
    assert_eq!(check(vec![place, zero]), Err(CommandError::Tokens { chunk: 1, tokens: 0 }));
    let many = ChunkPlace { tokens: 257, ..place };
    assert_eq!(check(vec![many]), Err(CommandError::Tokens { chunk: 0, tokens: 257 }));
    let odd = ChunkPlace { offset: 1, ..place };
    assert_eq!(check(vec![odd]), Err(CommandError::OddOffset { chunk: 0, offset: 1 }));
    for offset in [4, u64::MAX - 1] {
        let error = check(vec![ChunkPlace { offset, ..place }]).unwrap_err();
        let expected = CommandError::OutsideRegion {
            chunk: 0,
            offset,
            extent_bytes: chunk_bytes,
            region_bytes: chunk_bytes + 2,
        };
        assert_eq!(error, expected);
    }
    assert_eq!(fetch(vec![place]).check(|_| None), Err(CommandError::UnknownRegion { region: u32::MAX }));
    let lookup = |keys, timeout_ms| Command::Lookup { id: 1, keys, timeout_ms }.check(region);
    assert_eq!(lookup(vec![[0; 32]], 1), Ok(()));
    assert_eq!(lookup(vec![], 1), Err(CommandError::KeyCount { keys: 0 }));
    assert_eq!(lookup(vec![[0; 32]], 0), Err(CommandError::Timeout { timeout_ms: 0 }));
    let long = MAX_TIMEOUT_MS + 1;
    assert_eq!(lookup(vec![[0; 32]], long), Err(CommandError::Timeout { timeout_ms: long }));
}

#[test]
fn page_tables_are_judged_before_anything_is_copied() {
    let cache = cache();
    assert_eq!(cache.check(), Ok(()));
    let place = |tokens, offset| ChunkPlace { key: [0; 32], tokens, offset };
    let check = |table: &[u32], place| {
        fetch_to(Target::Pages { table: table.to_vec() }, vec![place])
            .check(|_| Some(RegionView::Pages(&cache)))
    };
    assert_eq!(check(&[9, 0, 5], place(48, 0)), Ok(()));
    assert_eq!(check(&[9, 0, 5], place(1, 47)), Ok(()));
    let outside = |end| CommandError::OutsideTable { chunk: 0, end, pages: 3, page_tokens: 16 };
    assert_eq!(check(&[9, 0, 5], place(48, 1)), Err(outside(49)));
    assert_eq!(check(&[9, 0, 5], place(1, u64::MAX)), Err(outside(u64::MAX)));
    assert_eq!(check(&[9, 10], place(1, 0)), Err(CommandError::Page { index: 1, page: 10, pages: 10 }));
    assert_eq!(check(&[], place(1, 0)), Err(CommandError::PageCount { pages: 0 }));
    let long = vec![0; MAX_PAGES_PER_FETCH + 1];
    assert_eq!(check(&long, place(1, 0)), Err(CommandError::PageCount { pages: long.len() }));
    assert_eq!(check(&[1], place(0, 0)), Err(CommandError::Tokens { chunk: 0, tokens: 0 }));

    let other = PagedKv { head_dim: 8, ..cache.clone() };
    let command = fetch_to(Target::Pages { table: vec![0] }, vec![place(1, 0)]);
    let error = command.check(|_| Some(RegionView::Pages(&other))).unwrap_err();
    assert!(matches!(error, CommandError::OtherShape { head_dim: 8, .. }), "{error}");

    let to_ring = fetch_to(Target::Ring, vec![place(32, 0), place(33, 0)]);
    let small = Err(CommandError::EntryTooSmall { chunk: 1, plane_bytes: 33 * 16, entry_bytes: 512 });
    let ring = ring();
    assert_eq!(to_ring.check(|_| Some(RegionView::Ring(&ring))), small);

    // What is for one kind of memory is refused by the others.
    let views = [RegionView::Host(1 << 30), RegionView::Pages(&cache), RegionView::Ring(&ring)];
    let commands = [fetch(vec![place(1, 0)]), command, fetch_to(Target::Ring, vec![place(1, 0)])];
    for (index, command) in commands.iter().enumerate() {
        for (other, view) in views.iter().enumerate() {
            let checked = command.check(|_| Some(*view));
            assert_eq!(checked.is_ok(), index == other, "{checked:?}");
            assert!(index == other || matches!(checked, Err(CommandError::OtherKind { .. })));
        }
    }
}

#[test]
fn long_texts_are_cut_between_characters() {
    let mut refused = Completion::Refused { id: 1, reason: "é".repeat(MAX_TEXT_BYTES) };
    assert!(refused.has_long_text());
    refused.cut_texts();
    assert!(!refused.has_long_text());
    let Completion::Refused { reason, .. } = refused else { unreachable!() };
    assert_eq!(reason, "é".repeat(MAX_TEXT_BYTES / 2));
}

#[test]
fn codecs_have_names() {
    for codec in Codec::ALL {
        assert_eq!(codec.to_string().parse(), Ok(codec));
    }
    assert!("deflate".parse::<Codec>().unwrap_err().to_string().contains("int4"));
}

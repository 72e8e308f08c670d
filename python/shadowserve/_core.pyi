from os import PathLike
from typing import Optional, Sequence

class Error(Exception): ...
class DataPlaneLost(Error): ...
class Refused(Error): ...
class RegionError(Error): ...

class Prefix:
    tokens: int
    chunk_tokens: list[int]
    is_whole: bool
    encoded_bytes: int
    sequence_bytes: int
    shape: Optional[tuple[int, int, int]]
    dtype: Optional[str]
    def __bool__(self) -> bool: ...

class Region:
    nbytes: int
    data_ptr: int
    def read(self, offset: int, nbytes: int) -> bytes: ...
    def __len__(self) -> int: ...

class Report:
    outcome: str
    planes: int
    encoded_bytes: int
    delivered_bytes: int
    missing: list[tuple[int, str]]
    message: str
    seconds: float
    def __bool__(self) -> bool: ...

class PagedCache:
    pages: int
    page_tokens: int

class RingEntry:
    offset: int
    nbytes: int
    fetch: int
    chunk: int
    layer: int
    side: str
    delivered: bool

class Ring:
    def peek(self) -> Optional[RingEntry]: ...
    def release(self) -> None: ...

class Fetch:
    id: int
    def poll(self) -> Optional[Report]: ...
    def wait(self, timeout: Optional[float] = None) -> Report: ...
    def cancel(self) -> None: ...

class SaveReport:
    outcome: str
    stored: int
    already_stored: int
    encoded_bytes: int
    not_saved: list[tuple[int, str]]
    fewer_copies: list[tuple[int, int, int, str]]
    message: str
    seconds: float
    def __bool__(self) -> bool: ...

class Save:
    def poll(self) -> Optional[SaveReport]: ...
    def wait(self, timeout: Optional[float] = None) -> SaveReport: ...
    def cancel(self) -> None: ...

class Client:
    data_plane: str
    lost: Optional[str]
    def __init__(
        self,
        socket: str | PathLike[str] = "/run/shadowserve.sock",
        *,
        model: str = "default",
        layout: str = "nhd",
        codec: str = "int4",
        rank: int = 0,
        salt: str = "",
        timeout: float = 2,
        spin: float = 0,
        profile: str | PathLike[str] | None = None,
    ) -> None: ...
    def lookup(self, tokens: Sequence[int], timeout: float = 1) -> Prefix: ...
    def register(self, nbytes: int) -> Region: ...
    def fetch(self, prefix: Prefix, region: Region, timeout: float = 5) -> Fetch: ...
    def register_pages(self, description: dict) -> PagedCache: ...
    def register_ring(self, description: dict) -> Ring: ...
    def fetch_pages(
        self, prefix: Prefix, cache: PagedCache, table: Sequence[int], skip: int = 0, timeout: float = 5
    ) -> Fetch: ...
    def fetch_ring(self, prefix: Prefix, ring: Ring, timeout: float = 5) -> Fetch: ...
    def save(
        self,
        tokens: Sequence[int],
        region: Region,
        shape: tuple[int, int, int],
        dtype: str = "bf16",
        skip: int = 0,
        timeout: float = 10,
    ) -> Save: ...
    def save_pages(
        self, tokens: Sequence[int], cache: PagedCache, table: Sequence[int], skip: int = 0, timeout: float = 10
    ) -> Save: ...
    def stats(self) -> str: ...

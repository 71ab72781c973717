"""Counts the device's memory: the storages of fake tensors that are alive."""

import weakref
from collections import Counter

from torch import Tensor

from .places import place

_ALLOCATION = 512
"""Bytes of which torch's allocator gives out a multiple."""


class DeviceMemory:
    """Bytes of the storages that are alive, by the kind of what they hold."""

    def __init__(self) -> None:
        self.used = 0
        self.peak = 0
        self.kinds_at_peak: Counter[str] = Counter()
        self.places_at_peak: Counter[str] = Counter()
        self._storages: dict[int, tuple[int, str, str]] = {}
        """Address of a storage -> its bytes, kind and place of birth."""
        self._kinds: Counter[str] = Counter()
        self._places: Counter[str] = Counter()
        self._is_above_peak = False

    def see(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _ALLOCATION) * _ALLOCATION
        where = place(depth=2)
        self._storages[key] = (size, kind, where)
        self._add(size, kind, where)
        if self.used > self.peak:
            self.peak = self.used
            self._is_above_peak = True
        weakref.finalize(storage, self._release, key)

    def rename(self, tensor: Tensor, kind: str) -> None:
        """Say what a tensor that is alive holds."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            size, _, where = self._storages[key]
            self._release(key)
            self._storages[key] = (size, kind, where)
            self._add(size, kind, where)

    def restart_peak(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.used
        self._note_peak()

    def finish(self) -> None:
        """Take note of a peak that nothing was released after."""
        if self._is_above_peak:
            self._note_peak()

    def _release(self, key: int) -> None:
        # The peak's parts are only looked at when it is over, which spares copying at each step up.
        if self._is_above_peak:
            self._note_peak()
        size, kind, where = self._storages.pop(key)
        self._add(-size, kind, where)

    def _add(self, size: int, kind: str, where: str) -> None:
        self.used += size
        self._kinds[kind] += size
        self._places[where] += size

    def _note_peak(self) -> None:
        self._is_above_peak = False
        self.kinds_at_peak = +self._kinds
        self.places_at_peak = +self._places

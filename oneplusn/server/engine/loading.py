"""Adapter versions on their way into the pool, written between the steps in bounded pieces."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from oneplusn.adapters.image import PageImage
from oneplusn.adapters.pool import Pool
from oneplusn.adapters.residents import Shortage
from oneplusn.errors import OneplusnError, PoolExhausted


@dataclass(frozen=True, slots=True)
class Arrival:
    """The end of a load: the version is published, or `error` says why not."""

    image: PageImage
    error: OneplusnError | None = None


class Loader:
    """A queue of page images, written one after the other; first come, first served.

    An image takes its space when its turn comes, not before, so that what has to make room for it
    serves until then. Where enough is free but scattered, the pool is compacted first. Where
    requests in flight hold too much, the queue waits until one of them has ended; where it is
    pins, or the size of the pool, the load fails.
    """

    def __init__(self, pool: Pool, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._clock = clock
        self._images: dict[str, PageImage] = {}
        self._pieces: Generator[None] | None = None
        self._blocked = False

    def __contains__(self, digest: str) -> bool:
        return digest in self._images

    @property
    def is_writing(self) -> bool:
        """Whether `work` has something to do now."""
        return bool(self._images) and not self._blocked

    def image(self, digest: str) -> PageImage:
        """Return an image that is on its way."""
        return self._images[digest]

    def add(self, image: PageImage) -> None:
        """Queue an image that is neither here nor resident."""
        assert image.digest not in self._images, f"{image.digest} is on its way already"
        self._images[image.digest] = image

    def remove(self, digest: str) -> None:
        """Take an image out of the queue, however much of it is written."""
        if digest == next(iter(self._images)):
            self._end_turn()
        del self._images[digest]

    def retry(self) -> None:
        """Look for room again: something that was in use may be idle now."""
        self._blocked = False

    def work(self, seconds: float) -> Iterator[Arrival]:
        """Write for about so long, one piece at least; yield each image when it is through.

        Whoever iterates acts on an arrival before the next image looks for room.
        """
        stop = self._clock() + seconds
        while self.is_writing:
            image = next(iter(self._images.values()))
            if self._pieces is None:
                self._pieces = self._bring_in(image)
            try:
                next(self._pieces)
            except StopIteration:
                yield self._arrive(image)
            except OneplusnError as error:
                yield self._arrive(image, error)
            if self._clock() >= stop:
                return

    def _arrive(self, image: PageImage, error: OneplusnError | None = None) -> Arrival:
        self.remove(image.digest)
        return Arrival(image, error)

    def _end_turn(self) -> None:
        """Leave the first image; what it has taken is given back unless it is published."""
        if self._pieces is not None:
            self._pieces.close()
        self._pieces, self._blocked = None, False

    def _bring_in(self, image: PageImage) -> Generator[None]:
        """Make room, write and publish; pause after every piece, and while there is no room.

        Raises:
            AdapterIncompatible: It was laid out for another base model.
            PoolExhausted: There will be no room for it.
        """
        while True:
            try:
                reservation = self._pool.reserve(image)
                break
            except PoolExhausted:
                shortage = self._pool.shortage(image)
                if shortage is Shortage.LASTING:
                    raise
            if shortage is Shortage.IN_USE:
                self._blocked = True
                yield
            else:
                for _ in self._pool.make_room(image):
                    yield
        try:
            for _ in self._pool.write(reservation):
                yield
        finally:
            if not reservation.written:
                self._pool.abort(reservation)
        self._pool.publish(reservation)

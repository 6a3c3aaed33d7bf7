"""The proof that model, tokenizer and SAEs are those that something was made with, or that a run was planned with.

Between the look of the driver and the start of a worker, files may be swapped, and a catalog outlives the files that
it was made of. So digests travel with the settings, and whoever loads a part compares it before doing anything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sae_census.errors import IdentityError
from sae_census.io.checkpoints import LoadedSae
from sae_census.io.tokens.tokenizer import Tokenizer
from sae_census.steps.store.identities import Measures
from sae_census.types import SiteKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Digests of the parts that something is planned or was made with."""

    model: str
    tokenizer: str
    saes: Mapping[str, str]
    """By site."""
    of: str = ""
    """What was made with them, as `catalog demo`; empty: the run that is under way."""

    @classmethod
    def of_measures(cls, measures: Measures, of: str = "") -> "Provenance":
        """What the identity of a run or a catalog says."""
        return cls(model=measures.model.digest, tokenizer=measures.model.tokenizer, saes=measures.saes, of=of)

    def only(self, sites: Iterable[SiteKey]) -> "Provenance":
        """The same, of some of the SAEs."""
        named = {str(site) for site in sites}
        return replace(self, saes={site: digest for site, digest in self.saes.items() if site in named})

    def prove(self, model_id: str, model_digest: str, tokenizer: Tokenizer, saes: Mapping[SiteKey, LoadedSae]) -> None:
        """Prove all parts.

        Args:
            model_id: what the user calls the model.
            model_digest: of the loaded one.
            tokenizer: the loaded one.
            saes: the loaded ones.

        Raises:
            IdentityError: if one is another.
        """
        self.prove_tokenizer(model_id, tokenizer)
        self._prove(f"model {model_id}", model_digest, self.model)
        self.prove_saes(saes)

    def prove_tokenizer(self, model_id: str, tokenizer: Tokenizer) -> None:
        """Raises IdentityError if the loaded tokenizer is another one."""
        self._prove(f"the tokenizer of {model_id}", tokenizer.digest_as(self.tokenizer), self.tokenizer)

    def prove_saes(self, saes: Mapping[SiteKey, LoadedSae]) -> None:
        """Raises IdentityError unless the loaded SAEs are these, no more and no less."""
        digests = {str(site): loaded.digest for site, loaded in saes.items()}
        for site in digests:
            if site not in self.saes:
                raise self._unknown(site)
        for site, then in self.saes.items():
            self._prove(f"SAE {site}", digests.get(site, "none"), then)

    def name_of(self, site: SiteKey, loaded: LoadedSae) -> str:
        """The site under which a loaded SAE is known here, which may have another name for it.

        Raises:
            IdentityError: if it is known under none.
        """
        point = f"{site.hook_point}/"
        for known, digest in self.saes.items():
            if digest == loaded.digest and known.startswith(point):
                return known
        raise self._unknown(str(site))

    def _unknown(self, site: str) -> IdentityError:
        known = ", ".join(self.saes) or "no SAE there"
        return IdentityError(
            f"{self.of or 'this run'} was not made with SAE {site}, but with {known}; name what it was made with, or "
            "make a catalog of this one with sae-census analyze"
        )

    def _prove(self, what: str, now: str, then: str) -> None:
        if now == then:
            return
        if self.of:
            raise IdentityError(
                f"{what} is not the one that {self.of} was made with (digest {now[:12]}, then {then[:12]}); put "
                "the old one back, or analyse again under another name"
            )
        raise IdentityError(
            f"{what} was changed while this run was under way (digest {now[:12]}, planned {then[:12]}); let its "
            "files be, and run the same command again"
        )

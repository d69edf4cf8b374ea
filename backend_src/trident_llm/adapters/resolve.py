"""AdapterResolver: what a request's options mean, given what is loaded and what the settings say."""

from __future__ import annotations

from ..config import EngineConfig
from ..errors import BadRequest, NotFound
from ..protocol import Submit
from .adapter import Blend, BlendTerm
from .mix import DEFAULT_NAME, Mix, MixUse
from .spec import AdapterTerm, parse_spec
from .store import AdapterStore


class AdapterResolver:
    """``store`` is None where the settings leave no room for adapters."""

    def __init__(self, store: AdapterStore | None, config: EngineConfig) -> None:
        self._store = store
        self._config = config

    def resolve(self, submit: Submit) -> Blend | MixUse | None:
        """None: the base model. Raises ``NotFound`` or ``BadRequest`` naming the option."""
        try:
            terms = parse_spec(submit.adapter, generations=True)
        except ValueError as error:
            raise BadRequest(f"adapter: {error}") from None
        if self._store is None:
            if terms:
                raise NotFound(f"adapter: {terms[0].name!r} is not loaded; this engine has no room for adapters")
            if submit.xlora:
                raise NotFound("xlora: no X-LoRA mix is loaded; this engine has no room for adapters")
            return None
        mix = self._mix(self._store, submit, terms)
        if mix is not None:
            return self._use(mix, submit)
        if submit.xlora_top_k is not None or submit.xlora_temperature is not None:
            name = "xlora_top_k" if submit.xlora_top_k is not None else "xlora_temperature"
            raise BadRequest(f"{name}: this request takes no X-LoRA mix; leave it out")
        return self._store.resolve(terms)

    def _mix(self, store: AdapterStore, submit: Submit, terms: tuple[AdapterTerm, ...]) -> Mix | None:
        """The mix that a request names, or means by naming nothing."""
        if not terms:
            mix = store.mixes.find(DEFAULT_NAME) if submit.xlora is not False else None
            if mix is None and submit.xlora:
                raise NotFound("xlora: no X-LoRA mix is loaded; set xlora, or load one with load_xlora")
            return mix
        found = [mix for term in terms if (mix := store.mixes.find(term.name, term.generation)) is not None]
        if found and (len(terms) > 1 or terms[0].weight != 1):
            raise BadRequest(f"adapter: {found[0].name!r} is an X-LoRA mix, which cannot be part of a blend")
        return found[0] if found else None

    def _use(self, mix: Mix, submit: Submit) -> Blend | MixUse:
        """Options win over settings, and settings over what the mix says of itself."""
        config, settings = mix.config, self._config
        factor = config.global_weight if settings.scaling_factor is None else settings.scaling_factor
        if settings.routing_method == "static":
            weight = factor / len(mix.members)
            return Blend(tuple(BlendTerm(member, weight) for member in mix.members), f"{mix.name}@{mix.generation}")
        top_k = next(
            value for value in (submit.xlora_top_k, settings.top_k_adapters, config.top_k) if value is not None
        )
        if top_k > len(mix.members):
            name = "top_k_adapters" if submit.xlora_top_k is None else "xlora_top_k"
            raise BadRequest(f"{name}: {top_k} is more than the {len(mix.members)} adapters of {mix.name!r}")
        return MixUse(
            mix=mix,
            top_k=top_k or len(mix.members),
            temperature=config.temperature if submit.xlora_temperature is None else submit.xlora_temperature,
            factor=factor,
            freeze_after=settings.freeze_after,
        )

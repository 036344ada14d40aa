"""The exceptions of fedface.

FedfaceError                 an error that the user can correct; the command line exits with code 2
├── ConfigError              a YAML file or an option is invalid
│   └── RangeError           a field has a value outside its range; also a ValueError
├── PhotoError               one photo file cannot be read; the reason is its text
├── LibraryError             a folder of photos cannot be scanned or has too few faces
├── WeightsError             a checkpoint does not fit, or its content is not as declared
├── PrivacyError             a privacy guarantee would not hold
│   ├── PolicyRefusal        the owner's policy refuses: requested, spent, allowed
│   └── LedgerError          the ledger is missing, damaged or locked
├── AggregationError         payloads that cannot be summed
├── FederationError          a cohort cannot run, or too few devices responded
└── RunError                 a run folder that cannot be started, resumed or read

A device's refusal is a value (messages.messages.Refusal), not an exception.
"""

from __future__ import annotations


class FedfaceError(Exception):
    """An error that the user can correct: what was expected, what was found, what to do."""


class ConfigError(FedfaceError):
    """A YAML file or an option is invalid."""


class RangeError(ConfigError, ValueError):
    """A field has a value outside the range that is declared for it."""


class PhotoError(FedfaceError):
    """One photo file cannot be read; the text is the reason."""


class LibraryError(FedfaceError):
    """A folder of photos cannot be scanned or has too few faces."""


class WeightsError(FedfaceError):
    """A checkpoint does not fit, or its content is not as declared."""


class PrivacyError(FedfaceError):
    """A privacy guarantee would not hold, so nothing was sent."""


class PolicyRefusal(PrivacyError):
    """The owner's policy refuses: the reason, and what the server can do about it."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(f"{reason}. {advice}" if advice else reason)
        self.reason, self.advice = reason, advice


class LedgerError(PrivacyError):
    """The privacy ledger is missing, damaged or locked."""


class AggregationError(FedfaceError):
    """Payloads that cannot be protected, summed or revealed."""


class FederationError(FedfaceError):
    """A cohort cannot run, or too few devices responded."""


class RunError(FedfaceError):
    """A run folder that cannot be started, resumed or read."""

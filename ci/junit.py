"""JUnit XML, as build servers read it: one testcase a check, the levels as classes.

Elements and attributes are those of the Jenkins JUnit plug-in's schema (junit-10.xsd). There are no time stamps: the
same engine and policy give the same file.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from lehr.ci.checks import Outcome, Report
from lehr.runtime.errors import LehrError

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2


def write(path: Path, report: Report) -> None:
    """One testcase a check; a waived failure, a note and a check that was not run are skipped, with their reason."""
    skipped = len(report.checks) - report.count(Outcome.PASSED) - report.count(Outcome.FAILED)
    suite = _suite(report.bundle, len(report.checks), failures=report.count(Outcome.FAILED), skipped=skipped)
    properties = ET.SubElement(suite, "properties")
    about = {"engine": report.engine, "policy": report.policy, "policy.sha256": report.policy_sha256}
    for name, value in {**about, **report.environment}.items():
        ET.SubElement(properties, "property", name=name, value=_clean(value))
    for check in report.checks:
        case = ET.SubElement(suite, "testcase", classname=f"{report.policy}.{check.level}", name=_clean(check.name))
        reason = _clean(check.reason)
        if check.outcome is Outcome.FAILED:
            ET.SubElement(case, "failure", message=reason, type="Failed").text = reason
        elif check.outcome is not Outcome.PASSED:
            ET.SubElement(case, "skipped", message=f"{check.outcome.value}: {reason}")
        else:
            ET.SubElement(case, "system-out").text = reason
    _write(path, suite)


def write_error(path: Path, bundle: str, error: LehrError) -> None:
    """One testcase with the error that kept the gate from judging."""
    suite = _suite(bundle, 1, errors=1)
    case = ET.SubElement(suite, "testcase", classname="gate", name="judged")
    message = _clean(str(error))
    ET.SubElement(case, "error", message=message, type=type(error).__name__).text = message
    _write(path, suite)


def _suite(bundle: str, tests: int, *, failures: int = 0, errors: int = 0, skipped: int = 0) -> ET.Element:
    counts = {"tests": tests, "failures": failures, "errors": errors, "skipped": skipped}
    about = {"name": _clean(f"lehr gate {bundle}"), **{name: str(count) for name, count in counts.items()}}
    return ET.Element("testsuite", about)


def _clean(text: str) -> str:
    """Without the characters that no XML file may hold, quoted or not."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _write(path: Path, suite: ET.Element) -> None:
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    path.write_bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")

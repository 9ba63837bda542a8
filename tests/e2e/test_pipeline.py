"""The whole product on the real node: Helm, kubectl, S3, every stage type; the same bits as on this machine."""

import pytest
from support.release import Release
from support.tenant import Tenant

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]


def test_first(tenant: Tenant) -> None:
    run = tenant.run(tenant.manifest("tiny"))
    print(run.until_succeeded())
    print(run.explain())

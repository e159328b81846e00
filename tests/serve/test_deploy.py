"The files of nbs/deploy: what a supervisor, a cluster and an image have to promise, read from the files themselves"
import re, shutil, subprocess, tomllib
from pathlib import Path
import pytest
import orcd
from orcd.serve.cli import FLAGS
from orcd.serve.worker import Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / 'nbs' / 'deploy'
DRAIN = Settings().drain_s                     # seconds that a running job has after SIGTERM


def text(name): return (DEPLOY / name).read_text()


def code(name): return '\n'.join(l for l in text(name).splitlines() if not l.strip().startswith('#'))


@pytest.mark.parametrize('name', ['orcd.service', 'Dockerfile', 'kubernetes.yaml'])
def test_flags_exist(name):
    "Every flag and every ORCD_ variable is one that the worker has"
    flags = {f.name for f in FLAGS} | {'settings'}
    worker = re.sub(r'RUN .*|HEALTHCHECK .*|COPY .*', '', code(name))
    used = (set(re.findall(r'(?<![\w-])--([a-z][a-z-]+)', worker))
        | {m.lower().replace('_', '-') for m in re.findall(r'ORCD_([A-Z_]+)', worker)} - {'cache-dir'})
    assert used <= flags and used


# --- systemd

def unit():
    "section -> [(key, value)] in order: systemd reads some keys many times, configparser does not"
    found, section = {}, None
    for line in text('orcd.service').splitlines():
        if not line or line[0] == '#': continue
        if m := re.fullmatch(r'\[(\w+)\]', line): section = found.setdefault(m[1], [])
        else: section.append(tuple(line.split('=', 1)))
    return found


def service(key): return [v for k, v in unit()['Service'] if k == key]


def test_unit_stops_after_the_drain():
    assert int(service('TimeoutStopSec')[-1]) > DRAIN + 5
    assert service('KillMode') == ['mixed']     # SIGTERM for the worker alone: its helpers serve the job that still runs
    assert service('Restart') == ['on-failure'] and service('RestartPreventExitStatus') == ['2']


def test_unit_reaches_the_gpu_and_no_other_device():
    assert service('DevicePolicy') == ['closed'] and service('PrivateDevices') == ['no']
    assert ({v.split()[0] for v in service('DeviceAllow')}
        == {f'char-{n}' for n in ('nvidia', 'nvidiactl', 'nvidia-frontend', 'nvidia-uvm', 'nvidia-caps')})


def test_unit_is_confined():
    yes = 'NoNewPrivileges ProtectHome PrivateTmp ProtectKernelTunables ProtectKernelModules ProtectKernelLogs ProtectControlGroups ' \
        'ProtectClock ProtectHostname RestrictSUIDSGID RestrictNamespaces RestrictRealtime LockPersonality'
    for key in yes.split(): assert service(key) == ['yes'], key
    assert service('ProtectSystem') == ['strict'] and service('CapabilityBoundingSet') == [''] and service('User') == ['orcd']
    assert service('SystemCallFilter') == ['@system-service', '~@privileged'] and service('SystemCallArchitectures') == ['native']
    assert set(service('RestrictAddressFamilies')[0].split()) == {'AF_INET', 'AF_INET6', 'AF_UNIX'}


def test_unit_hands_the_token_over_as_a_credential():
    start, = service('ExecStart')
    for name in re.findall(r'\$\{CREDENTIALS_DIRECTORY\}/(\S+)', start): assert f'{name}:/etc/orcd/{name}' in service('LoadCredential')
    assert '--token-file ${CREDENTIALS_DIRECTORY}/token' in start


def test_unit_in_the_eyes_of_systemd():
    "systemd's own judgement, from 0 (closed) to 10 (open)"
    tool = shutil.which('systemd-analyze')
    if not tool: pytest.skip('needs the program systemd-analyze')
    if int(re.search(r'systemd (\d+)', subprocess.run([tool, '--version'], capture_output=True, text=True).stdout)[1]) < 250:
        pytest.skip('needs systemd-analyze 250')
    r = subprocess.run([tool, 'security', '--offline=true', '--threshold=30', '--no-pager', DEPLOY / 'orcd.service'],
        capture_output=True, text=True)
    assert r.returncode == 0 and 'Overall exposure level' in r.stdout, r.stdout[-300:] + r.stderr


# --- Kubernetes

@pytest.fixture(scope='module')
def cluster():
    "kind -> object"
    objects = pytest.importorskip('yaml', reason='needs the package PyYAML').safe_load_all(text('kubernetes.yaml'))
    return {o['kind']: o for o in objects}


@pytest.fixture
def pod(cluster): return cluster['Deployment']['spec']['template']['spec']


@pytest.fixture
def container(pod):
    found, = pod['containers']
    return found


def restricted(pod):
    "What the Pod Security Standard called restricted finds wrong with a pod"
    wrong, ours = [], pod.get('securityContext', {})
    if any(pod.get(k) for k in ('hostNetwork', 'hostPID', 'hostIPC')): wrong.append('host namespaces')
    for v in pod.get('volumes', []):
        kinds = set(v) - {'name'}
        if not kinds <= {'configMap', 'csi', 'downwardAPI', 'emptyDir', 'ephemeral', 'persistentVolumeClaim', 'projected', 'secret'}:
            wrong.append(f'volume {kinds}')
    for c in pod['containers'] + pod.get('initContainers', []):
        s = c.get('securityContext', {})
        get = lambda key: s.get(key, ours.get(key))
        if s.get('privileged'): wrong.append('privileged')
        if s.get('allowPrivilegeEscalation') is not False: wrong.append('allowPrivilegeEscalation')
        if get('runAsNonRoot') is not True or get('runAsUser') == 0: wrong.append('runAsNonRoot')
        if (get('seccompProfile') or {}).get('type') not in ('RuntimeDefault', 'Localhost'): wrong.append('seccompProfile')
        if 'ALL' not in s.get('capabilities', {}).get('drop', []) or set(s['capabilities'].get('add', [])) - {'NET_BIND_SERVICE'}:
            wrong.append('capabilities')
        if any('hostPort' in p for p in c.get('ports', [])): wrong.append('hostPort')
    return wrong


def test_pod_is_restricted(cluster, pod, container):
    assert restricted(pod) == []
    assert cluster['Namespace']['metadata']['labels']['pod-security.kubernetes.io/enforce'] == 'restricted'
    assert not pod['automountServiceAccountToken'] and not pod['enableServiceLinks']
    for key in ('allowPrivilegeEscalation', 'capabilities'):     # the check sees what is missing
        worse = dict(container, securityContext={k: v for k, v in container['securityContext'].items() if k != key})
        assert restricted(dict(pod, containers=[worse])) == [key]
    assert restricted({k: v for k, v in pod.items() if k != 'securityContext'}) == ['runAsNonRoot', 'seccompProfile']


def test_pod_writes_into_its_volumes_only(pod, container):
    assert container['securityContext']['readOnlyRootFilesystem'] is True
    written = {m['mountPath'] for m in container['volumeMounts'] if not m.get('readOnly')}
    kinds = {v['name']: v for v in pod['volumes']}
    assert (written == {'/cache', '/tmp'}
        and all('sizeLimit' in kinds[m['name']]['emptyDir'] for m in container['volumeMounts'] if m['mountPath'] in written))
    for e in container['env']: assert Path(e['value']).is_relative_to('/cache'), e
    assert {'ORCD_CACHE_DIR', 'CUPY_CACHE_DIR', 'CUDA_CACHE_PATH'} == {e['name'] for e in container['env']}


def test_pod_has_one_gpu_and_bounds(pod, container):
    r = container['resources']
    assert r['limits']['nvidia.com/gpu'] == 1 and r['limits']['memory'] == r['requests']['memory']
    for kind in ('cpu', 'memory', 'ephemeral-storage'): assert kind in r['requests'] and kind in r['limits']
    assert pod['terminationGracePeriodSeconds'] > DRAIN + 5


def test_pod_is_probed(container):
    for kind in ('startupProbe', 'readinessProbe', 'livenessProbe'):
        assert container[kind]['httpGet'] == {'path': '/health', 'port': 'http'}
    start = container['startupProbe']
    assert start['periodSeconds'] * start['failureThreshold'] >= 120      # a cold cache compiles all kernels first


def test_token_is_a_secret_and_a_file(pod, container):
    args = dict(zip(container['args'][::2], container['args'][1::2]))
    mount, = [m for m in container['volumeMounts'] if Path(args['--token-file']).is_relative_to(m['mountPath'])]
    volume, = [v for v in pod['volumes'] if v['name'] == mount['name']]
    assert (volume['secret']['items'] == [{'key': 'token', 'path': Path(args['--token-file']).name}]
        and volume['secret']['defaultMode'] == 0o440)
    assert not any('TOKEN' in e['name'] for e in container['env'])


def test_network_policy(cluster):
    policy, deployment = cluster['NetworkPolicy'], cluster['Deployment']
    labels = deployment['spec']['template']['metadata']['labels']
    assert (policy['spec']['podSelector']['matchLabels'].items() <= labels.items() and cluster['Service']['spec']['selector'].items()
        <= labels.items())
    assert policy['spec']['policyTypes'] == ['Ingress', 'Egress'] and policy['spec']['egress'] == []
    rule, = policy['spec']['ingress']
    assert (rule['ports'] == [{'protocol': 'TCP', 'port': 'http'}]
        and all(f.get('podSelector') and f.get('namespaceSelector') for f in rule['from']))
    assert {o['metadata'].get('namespace', o['metadata']['name']) for o in cluster.values()} == {'orcd'}


# --- the image

def test_images_are_pinned(container):
    bases = re.findall(r'^FROM (\S+)', text('Dockerfile'), re.M)
    for b in bases: assert re.fullmatch(r'python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}', b), b
    assert len(set(bases)) == 1
    assert container['image'] == f'orcd:{orcd.__version__}' and f'-t orcd:{orcd.__version__} ' in text('Dockerfile')


def test_image_runs_as_the_user_of_the_pod(pod):
    uid = pod['securityContext']['runAsUser']
    assert f'\nUSER {uid}:{pod["securityContext"]["runAsGroup"]}\n' in text('Dockerfile') and f'--uid {uid}' in text('Dockerfile')


def test_image_installs_what_is_locked():
    run = ' '.join(l for l in code('Dockerfile').splitlines() if 'pip install' in l)
    assert '--require-hashes' in run and '--no-index --no-deps --no-build-isolation .' in run      # the second one cannot reach an index


# --- the lock

def locked():
    "name -> (version, number of hashes) of every entry"
    entries = re.split(r'\n(?=[a-z])', re.sub(r'^\s*#.*\n', '', text('requirements.lock'), flags=re.M))
    found = {}
    for e in entries:
        name, version = re.match(r'([\w.-]+)(?:\[[\w,]+\])?==(\S+)', e.strip()).groups()
        found[name.lower().replace('_', '-')] = version, len(re.findall(r'--hash=sha256:[0-9a-f]{64}\b', e))
    return found


def test_lock_covers_the_dependencies():
    from packaging.requirements import Requirement
    project, lock = tomllib.loads((ROOT / 'pyproject.toml').read_text()), locked()
    extras = project['project']['optional-dependencies']
    wanted = [*project['project']['dependencies'], *extras['cuda13'], *extras['hub'], *project['build-system']['requires']]
    for r in map(Requirement, wanted):
        version, hashes = lock.get(r.name.lower().replace('_', '-'), (None, 0))
        assert version and r.specifier.contains(version), f'{r} has no version in nbs/deploy/requirements.lock that fits: run `make lock`'
    assert all(n for _, n in lock.values()), 'an entry without a hash'
    assert len(lock) > 30                                                     # what they need in turn is there too

{{- define "plumbline.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "plumbline.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- $name := include "plumbline.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "plumbline.selectorLabels" -}}
app.kubernetes.io/name: {{ include "plumbline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "plumbline.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "plumbline.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: plumbline
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "plumbline.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "plumbline.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: name an existing ServiceAccount, or set serviceAccount.create to true" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* An image reference from {image: {repository, tag, digest}, version}: a digest wins over a tag. */}}
{{- define "plumbline.image" -}}
{{- if .image.digest }}
{{- printf "%s@%s" .image.repository .image.digest }}
{{- else }}
{{- printf "%s:%s" .image.repository (default .version .image.tag) }}
{{- end }}
{{- end }}

{{- define "plumbline.operatorImage" -}}
{{- include "plumbline.image" (dict "image" .Values.operator.image "version" .Chart.AppVersion) }}
{{- end }}

{{/* What the restricted pod security standard asks of a pod and of a container. */}}
{{- define "plumbline.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "plumbline.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* A pod that runs one of files/scripts; its account stands beside it. */}}
{{- define "plumbline.scriptPod" -}}
automountServiceAccountToken: true
enableServiceLinks: false
{{- with .Values.operator.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "plumbline.podSecurityContext" . | nindent 2 }}
{{- with .Values.operator.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.operator.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 16Mi}
{{- end }}

{{- define "plumbline.scriptContainer" -}}
image: {{ include "plumbline.operatorImage" . | quote }}
imagePullPolicy: {{ .Values.operator.image.pullPolicy }}
command: [python3]
securityContext:
  {{- include "plumbline.containerSecurityContext" . | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "plumbline.runtimeHook" -}}
helm.sh/hook: post-install,post-upgrade,post-rollback
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- define "plumbline.runtime" -}}
{{- $values := .Values.runtime }}
{{- $spec := deepCopy $values.spec }}
{{- range $field, $instead := dict "image" "runtime.image" "imagePullPolicy" "runtime.image.pullPolicy" "storage" "runtime.storage" }}
{{- if hasKey $spec $field }}
{{- fail (printf "runtime.spec.%s: set %s instead" $field $instead) }}
{{- end }}
{{- end }}
{{- $_ := set $spec "image" (include "plumbline.image" (dict "image" $values.image "version" .Chart.AppVersion)) }}
{{- $_ := set $spec "imagePullPolicy" $values.image.pullPolicy }}
{{- with $values.storage }}
{{- $_ := set $spec "storage" . }}
{{- end }}
apiVersion: plumbline.dev/v1alpha1
kind: AlignmentRuntime
metadata:
  name: {{ $values.name }}
  labels:
    {{- include "plumbline.labels" . | nindent 4 }}
  annotations:
    plumbline.dev/is-default-runtime: {{ $values.default | quote }}
spec:
  {{- toYaml $spec | nindent 2 }}
{{- end }}

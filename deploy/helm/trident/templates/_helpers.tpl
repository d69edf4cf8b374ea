{{- define "trident.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "trident.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "trident.labels" -}}
{{ include "trident.selector" . }}
{{ include "trident.release" . }}
{{- end -}}

{{- /* A name of its own: the services of the servers must not find the gateway's pods. */ -}}
{{- define "trident.gatewaySelector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "trident.gatewayLabels" -}}
{{ include "trident.gatewaySelector" . }}
{{ include "trident.release" . }}
{{- end -}}

{{- define "trident.release" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "trident.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- /* The engine has generated a token and its doors are connected; Triton's own readiness stays 200 without an engine. */ -}}
{{- define "trident.engineReady" -}}
exec:
  command:
    - bash
    - -c
    - curl --fail --silent http://127.0.0.1:8002/metrics | grep --quiet '^trident_engine_ready.* 1$'
timeoutSeconds: 5
{{- end -}}

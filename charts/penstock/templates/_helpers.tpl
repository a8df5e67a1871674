{{/* Name of the release's objects, at most 53 characters so that suffixes fit. */}}
{{- define "penstock.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-penstock" .Release.Name) (contains "penstock" .Release.Name) -}}
{{- printf "%s-operator" ($name | trunc 44 | trimSuffix "-") -}}
{{- end -}}

{{- define "penstock.selector" -}}
app.kubernetes.io/name: penstock-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "penstock.labels" -}}
{{ include "penstock.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "penstock.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "penstock.fullname" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{/* The operator's ServiceAccount as the subject of a binding. */}}
{{- define "penstock.subject" -}}
- kind: ServiceAccount
  name: {{ include "penstock.serviceAccount" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
